"""Finds the families: every other file of this folder that holds a `FAMILY`."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ferry.core.errors import InputError, did_you_mean
from ferry.core.family import Config, Family, Model

GENERIC = "gpt"
"""Megatron's name for every decoder-only model: the seed's scripts pass `--model-type GPT` whatever the family."""


@cache
def families() -> dict[str, Family]:
    """Return all families by name."""
    names = sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "registry")
    )
    found = [import_module(f"ferry.families.{name}").FAMILY for name in names]
    return {family.name: family for family in found}


def detect(config: Config, where: str) -> Family:
    """Return the family whose `model_type` the config names."""
    wanted = config.get("model_type")
    for family in families().values():
        if wanted in family.model_types and (family.matches is None or family.matches(config)):
            return family
    known = sorted(name for family in families().values() for name in family.model_types)
    raise InputError(
        f"{where} has model_type {wanted!r}, expected one of {', '.join(known)}{did_you_mean(str(wanted), known)}",
        code="family.unknown",
        repair="a new family is one file: docs/porting-a-family.md",
    )


def check_name(family: Family, name: str, where: str) -> None:
    """Refuse a `--model-type` that names another family than the one detected."""
    word = name.lower().replace("_", "-")
    if word == GENERIC or word in {
        known.replace("_", "-") for known in (family.name, *family.models, *family.model_types)
    }:
        return
    others = {known: other.name for other in families().values() for known in (other.name, *other.models)}
    if name.lower() in others:
        raise InputError(
            f"{where} is a {family.name} model, --model-type says {name} ({others[name.lower()]})",
            code="family.mismatch",
            repair="leave --model-type out: the family is detected",
        )
    raise InputError(
        f"--model-type {name} is no family Ferry knows{did_you_mean(name, list(others))}",
        code="family.name",
        repair=f"{where} is a {family.name} model; leave --model-type out",
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return a model's config.json."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no config.json", code="hf.no-config") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", code="hf.config") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object", code="hf.config")
    return document


def model_of(config: Config, where: str) -> Model:
    """Return the model a config.json describes."""
    family = detect(config, where)
    return Model(family, family.dims(config), config)
