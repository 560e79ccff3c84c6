"""From a YAML file to a checked `Voyage`. Everything that can be known to be wrong is found here, before the first step
runs, and named at once with its line: unknown keys, verbs and names, wrong values, references to later steps, gates
that do not parse."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ferry.control.voyage.checking import check_references, check_step, gates_of
from ferry.control.voyage.config import RunConfig
from ferry.control.voyage.lines import Document, Place, read_document
from ferry.control.voyage.references import find, substitute
from ferry.control.voyage.voyage import BUILT_IN_NAMES, Step, Voyage, own_names
from ferry.core.errors import ConfigError, did_you_mean

VOYAGE_KEYS = ("name", "title", "output", "variables", "steps", "gates")
STEP_KEYS = ("name", "verb", "with", "command", "env", "gates")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def read_voyage(config: RunConfig) -> Voyage:
    """Read and check a voyage file; raise one ConfigError that names everything wrong with it."""
    document = read_document(Path(os.path.abspath(config.file)))
    values = document.values
    _check_keys(document, (), values, VOYAGE_KEYS, ("steps",))
    name = _name(document, ("name",), values.get("name", document.file.stem))
    title = _text(document, ("title",), values.get("title", name))
    output = Path(os.path.abspath(config.output or _text(document, ("output",), values.get("output", name))))
    variables = _variables(document, config, name, output)
    steps = _steps(document)
    voyage = Voyage(document.file, name, title, output, variables, tuple(steps.values()), gates_of(document, steps))
    for index, step in enumerate(voyage.steps):
        check_step(document, voyage, step, index)
    document.raise_if_wrong()
    return voyage


def _check_keys(
    document: Document, place: Place, found: Mapping[str, Any], known: tuple[str, ...], required: tuple[str, ...]
) -> None:
    for key in found:
        if key not in known:
            document.wrong((*place, key), f"unknown key {key!r}{did_you_mean(key, list(known))}", "run.unknown-key")
    for key in required:
        if key not in found:
            document.wrong(place, f"{key!r} is missing")


def _name(document: Document, place: Place, value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        document.wrong(place, f"{value!r} is not a name: expected letters, digits, - and _, a letter first")
    return str(value)


def _text(document: Document, place: Place, value: object) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        document.wrong(place, f"expected text, found {type(value).__name__}")
    return str(value)


def _variables(document: Document, config: RunConfig, name: str, output: Path) -> dict[str, Any]:
    """Return the variables with the user's values over the file's; each may name the ones before it."""
    given = document.values.get("variables") or {}
    if not isinstance(given, dict):
        document.wrong(("variables",), "expected a mapping")
        return {}
    for key in config.variables:
        if key not in given:
            text = f"{document.file.name} has no variable {key!r}{did_you_mean(key, list(given))}"
            raise ConfigError(text, code="run.unknown-variable")
    variables: dict[str, Any] = {}
    for key, value in {**given, **config.variables}.items():
        place = ("variables", key)
        if key in BUILT_IN_NAMES or not NAME.fullmatch(key):
            document.wrong(place, f"a variable cannot be named {key!r}")
            continue
        names = own_names(document.file, name, output, dict(variables))
        if check_references(document, place, value, names, []):
            variables[key] = substitute(value, partial(find, names))
    return variables


def _steps(document: Document) -> dict[str, Step]:
    found = document.values.get("steps", [])
    if not isinstance(found, list) or not found:
        document.wrong(("steps",), "expected a list of steps")
        return {}
    steps: dict[str, Step] = {}
    for index, item in enumerate(found):
        place: Place = ("steps", index)
        if not isinstance(item, dict):
            document.wrong(place, "a step is a mapping with name and verb, or name and command")
            continue
        step = _step(document, place, item)
        if step.name in steps:
            document.wrong((*place, "name"), f"there are two steps named {step.name!r}")
        steps[step.name] = step
    return steps


def _step(document: Document, place: Place, item: dict[str, Any]) -> Step:
    _check_keys(document, place, item, STEP_KEYS, ("name",))
    name = _name(document, (*place, "name"), item["name"]) if "name" in item else f"step {place[-1]}"
    if ("verb" in item) == ("command" in item):
        document.wrong(place, f"step {name!r} needs a verb or a command, and not both")
    for key, owner in (("with", "verb"), ("env", "command")):
        if key in item and owner not in item:
            document.wrong((*place, key), f"step {name!r}: {key!r} belongs to a {owner}")
    fields, env = item.get("with") or {}, item.get("env") or {}
    for key, value in (("with", fields), ("env", env)):
        if not isinstance(value, dict):
            document.wrong((*place, key), "expected a mapping")
    command = item.get("command", [])
    words = command if isinstance(command, list) else []
    if "command" in item and (not words or any(isinstance(word, list | dict) for word in words)):
        document.wrong((*place, "command"), 'expected a list of words, like ["${python}", "ask.py"]')
    return Step(
        name=name,
        verb=str(item.get("verb") or ""),
        fields={str(key).replace("-", "_"): value for key, value in fields.items()} if isinstance(fields, dict) else {},
        command=tuple(str(word) for word in words),
        env={str(key): str(value) for key, value in env.items()} if isinstance(env, dict) else {},
        line=document.line(place),
    )
