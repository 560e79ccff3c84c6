"""The manual's table of recommended values, and the sizes of its models.

`manual.csv` holds the 128 rows as the manual prints them, errors and blanks included: `full` trains all weights (SFT
and pretraining), `mbs` is the micro batch, blank cells stay blank. `models.csv` holds, for each of the 33 models, the
keys of its published config.json that decide its sizes, and the longest text it was made for. Sizes are read through
the families, as for any model. `problems` says by arithmetic what does not fit together; `corrected` mends devices.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import ceil
from typing import Any, Literal, NamedTuple

from ferry.core.errors import FerryError, InputError, did_you_mean
from ferry.core.family import Dims
from ferry.core.mesh import Mesh, check_mesh
from ferry.families.registry import model_of

Method = Literal["full", "lora"]
METHODS: dict[str, Method] = {"full": "full", "sft": "full", "pretrain": "full", "lora": "lora"}
"""What users say, and what the manual says: SFT and pretraining train all weights."""


class KnownModel(NamedTuple):
    """A model of the table: its sizes, and the longest sequence its publisher made it for."""

    name: str
    dims: Dims
    max_positions: int


class Problem(NamedTuple):
    """One thing that does not fit together in a recipe, and what Ferry does instead."""

    kind: Literal["devices", "blank", "layout", "positions"]
    text: str
    proposal: str


@dataclass(frozen=True)
class Recipe:
    """One row of the table. `nodes` and `devices_per_node` are None where the table has a blank."""

    family: str
    model: str
    method: Method
    seq_len: int
    tp: int
    pp: int
    micro_batch: int
    nodes: int | None
    devices_per_node: int | None

    @property
    def id(self) -> str:
        return f"{self.model}-{self.method}-{self.seq_len}"

    @property
    def devices(self) -> int | None:
        if self.nodes is None or self.devices_per_node is None:
            return None
        return self.nodes * self.devices_per_node

    @property
    def mesh(self) -> Mesh | None:
        """Return the mesh with the dp that the devices leave, or None if they are unknown or do not divide."""
        ranks = self.tp * self.pp
        if self.devices is None or self.devices % ranks:
            return None
        return Mesh(self.tp, self.pp, 1, self.devices // ranks)


@cache
def recipes() -> dict[str, Recipe]:
    """Return every recipe by id, in the order of the manual."""
    rows = [
        Recipe(
            family=row["family"],
            model=row["model"],
            method=METHODS[row["method"]],
            seq_len=int(row["seq_len"]),
            tp=int(row["tp"]),
            pp=int(row["pp"]),
            micro_batch=int(row["mbs"]),
            nodes=int(row["nodes"]) if row["nodes"] else None,
            devices_per_node=int(row["devices_per_node"]) if row["devices_per_node"] else None,
        )
        for row in _table("manual.csv")
    ]
    found = {recipe.id: recipe for recipe in rows}
    assert len(found) == len(rows), "two rows of manual.csv have one id"
    return found


@cache
def known_models() -> dict[str, KnownModel]:
    """Return every model of the table by name."""
    found: dict[str, KnownModel] = {}
    for row in _table("models.csv"):
        name, max_positions = row.pop("model"), int(row.pop("max_positions"))
        config = {key: _value(text) for key, text in row.items() if text}
        found[name] = KnownModel(name, model_of(config, name).dims, max_positions)
    return found


def find_recipe(recipe_id: str) -> Recipe:
    """Return a recipe by id, as the table has it. `sft` and `pretrain` stand for `full`; case does not matter."""
    wanted = recipe_id.lower().replace("_", "-")
    for word, method in METHODS.items():
        wanted = wanted.replace(f"-{word}-", f"-{method}-")
    if wanted not in recipes():
        raise InputError(
            f"there is no recipe {recipe_id!r}{did_you_mean(wanted, list(recipes()))}",
            code="recipes.unknown",
            repair="`ferry recipes` lists them, `ferry recipes propose` makes one",
        )
    return recipes()[wanted]


def find_model(name: str) -> KnownModel:
    """Return a model of the table by name."""
    wanted = name.lower().replace("_", "-")
    if wanted not in known_models():
        raise InputError(
            f"there is no model {name!r} in the recipes{did_you_mean(wanted, list(known_models()))}",
            code="recipes.unknown-model",
            repair="give the directory of a model with its config.json",
        )
    return known_models()[wanted]


def problems(recipe: Recipe) -> tuple[Problem, ...]:
    """Return what does not fit together in a recipe; empty for a sound one."""
    return tuple(_problems(recipe))


def corrected(recipe: Recipe) -> Recipe:
    """Return the recipe with devices that fit: its own where they do, else the ones its problems propose."""
    if recipe.devices is None:
        per_node = _devices_per_node(recipe)
        return replace(recipe, nodes=ceil(recipe.tp * recipe.pp / per_node), devices_per_node=per_node)
    partner = _exchanged_with(recipe)
    if partner is not None:
        return replace(recipe, nodes=partner.nodes, devices_per_node=partner.devices_per_node)
    if recipe.mesh is None:
        assert recipe.devices_per_node is not None
        return replace(recipe, nodes=ceil(recipe.tp * recipe.pp / recipe.devices_per_node))
    return recipe


def _problems(recipe: Recipe) -> Iterator[Problem]:
    better = corrected(recipe)
    ranks = f"tp*pp={recipe.tp * recipe.pp} (tp={recipe.tp} pp={recipe.pp})"
    partner = _exchanged_with(recipe)
    hint = f"; the cells of {recipe.id} and {partner.id} look exchanged" if partner else ""
    proposal = f"{better.nodes} x {better.devices_per_node} devices, {better.mesh}{hint}"
    if recipe.devices is None:
        yield Problem("blank", "the manual names no devices", f"{proposal}: the fewest whole nodes that hold {ranks}")
    elif recipe.mesh is None:
        yield Problem("devices", f"{ranks} does not divide {recipe.devices} devices", proposal)
    elif partner is not None:
        text = f"{ranks} has {recipe.devices} devices, {partner.id} with tp*pp={partner.tp * partner.pp} has fewer"
        yield Problem("devices", text, proposal)
    known = known_models()[recipe.model]
    try:
        check_mesh(known.dims, better.mesh or Mesh(recipe.tp, recipe.pp), model=recipe.model)
    except FerryError as error:
        yield Problem("layout", error.message, error.repair)
    if recipe.seq_len > known.max_positions:
        yield Problem(
            "positions",
            f"seq_len={recipe.seq_len} is longer than max_positions={known.max_positions} of {recipe.model}",
            f"train with {known.max_positions}, or raise the limit in the model's config.json",
        )


def _exchanged_with(recipe: Recipe) -> Recipe | None:
    """Return the other method's row, if one of the two has impossible devices and both fit with devices exchanged."""
    for other in recipes().values():
        if (other.model, other.seq_len) != (recipe.model, recipe.seq_len) or other.method == recipe.method:
            continue
        if recipe.devices is None or other.devices is None or (recipe.mesh is not None and other.mesh is not None):
            continue
        both_fit = not other.devices % (recipe.tp * recipe.pp) and not recipe.devices % (other.tp * other.pp)
        return other if both_fit else None
    return None


def _devices_per_node(recipe: Recipe) -> int:
    """Return the node of the model's other rows, or of the whole table's largest."""
    all_rows = recipes().values()
    own = [row.devices_per_node for row in all_rows if row.model == recipe.model and row.devices_per_node]
    return own[0] if own else max(row.devices_per_node or 1 for row in all_rows)


def _table(name: str) -> list[dict[str, str]]:
    text = files("ferry.recipes").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _value(text: str) -> Any:
    """Return a value of config.json from a cell."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text
