"""The smoothing graph of one layer, resolved to tensors: what is divided, what is multiplied, and by which channels.

A family says it in roles (`Family.smoothing`); here roles become bands of rows of canonical tensors, one group for each
set of factors. Nothing here knows numbers: `ferry.verbs.quantize` computes factors and folds them.
"""

from __future__ import annotations

from typing import NamedTuple

from ferry.core import family as f
from ferry.core.family import Model
from ferry.core.layout import Part

BIAS_OF = {f.QUERY: f.QUERY_BIAS, f.KEY: f.KEY_BIAS, f.VALUE: f.VALUE_BIAS}
SUFFIX = ".weight"


class Group(NamedTuple):
    """One set of factors: `source` rows (and `bias`) are divided by them, the columns of `into` multiplied.

    `key` names the group in files and messages (`model.layers.3.qkv`). There are `num_factors` factors; each serves
    `repeats` heads of `head_dim` input channels where a key-value head is read by several query heads (else 1).
    """

    key: str
    kind: str
    source: Part
    bias: Part | None
    into: tuple[Part, ...]
    num_factors: int
    repeats: int
    head_dim: int
    from_norm: bool
    feeds_router: bool


class LinearWeight(NamedTuple):
    """A two-dimensional weight of a layer that can be quantized: `module` is its name without `.weight`."""

    module: str
    name: str
    rows: int
    cols: int
    expert: int | None


def layer_prefix(model: Model, layer: int) -> str:
    """Return what the names of a layer's tensors begin with: `model.layers.3.`."""
    name = model.part(f.ATTENTION_NORM, layer).name
    return name[: name.index(f".{layer}.") + len(f".{layer}.")]


def layer_tensors(model: Model, layer: int) -> dict[str, Part]:
    """Return every canonical tensor of a layer as a whole part, in the order of the model."""
    found: dict[str, Part] = {}
    for role in model.layer_roles(layer):
        for expert in range(model.dims.num_experts) if role in f.EXPERT_ROLES else (0,):
            part = model.part(role, layer, expert)
            rows = max(part.row + part.rows, found[part.name].rows if part.name in found else 0)
            found[part.name] = part._replace(row=0, rows=rows)
    return found


def linears(model: Model, layer: int) -> list[LinearWeight]:
    """Return the linears of a layer: every matrix but the router."""
    router = model.part(f.ROUTER, layer).name if model.dims.is_moe(layer) else ""
    expert_of = {}
    if router:
        expert_of = {
            model.part(role, layer, expert).name: expert
            for expert in range(model.dims.num_experts)
            for role in f.EXPERT_ROLES
        }
    return [
        LinearWeight(name.removesuffix(SUFFIX), name, part.rows, part.cols, expert_of.get(name))
        for name, part in layer_tensors(model, layer).items()
        if part.ndim == 2 and name != router
    ]


def groups(model: Model, layer: int) -> list[Group]:
    """Return the groups of a layer, in the order of its family; one per expert where experts are the source."""
    present = set(model.layer_roles(layer))
    prefix = layer_prefix(model, layer)
    found = []
    for edge in model.family.smoothing:
        into = [role for role in edge.into if role in present]
        if edge.source not in present or len(into) < len(edge.into):
            continue
        for expert in range(model.dims.num_experts) if edge.source in f.EXPERT_ROLES else (0,):
            key = f"{prefix}experts.{expert}.{edge.name}" if edge.source in f.EXPERT_ROLES else f"{prefix}{edge.name}"
            found.append(_group(model, layer, expert, edge, key))
    return found


def _group(model: Model, layer: int, expert: int, edge: f.Smoothing, key: str) -> Group:
    source = model.part(edge.source, layer, expert)
    fans_out = edge.source not in f.EXPERT_ROLES
    into = [
        model.part(role, layer, each)
        for role in edge.into
        for each in (range(model.dims.num_experts) if role in f.EXPERT_ROLES and fans_out else (expert,))
    ]
    bias = BIAS_OF.get(edge.source, "")
    dims = model.dims
    return Group(
        key=key,
        kind=edge.name,
        source=source,
        bias=model.part(bias, layer) if bias in model.roles else None,
        into=tuple(into),
        num_factors=source.rows,
        repeats=dims.num_heads // dims.num_groups if edge.heads else 1,
        head_dim=dims.head_dim if edge.heads else 1,
        from_norm=source.ndim == 1,
        feeds_router=f.ROUTER in edge.into,
    )
