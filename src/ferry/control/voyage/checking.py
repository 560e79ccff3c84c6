"""What can be known to be wrong with steps and gates before the first step runs: references that lead nowhere, verbs
and fields that do not exist, values that are out of bounds, gates that do not parse."""

from __future__ import annotations

from functools import partial
from typing import Any

from ferry.control.voyage.expression import names_in
from ferry.control.voyage.fields import field_layer
from ferry.control.voyage.lines import Document, Place
from ferry.control.voyage.parsing import parse
from ferry.control.voyage.references import find, references_in, step_of, substitute
from ferry.control.voyage.voyage import Gate, Step, Voyage
from ferry.core.config import Problem, problems_of
from ferry.core.errors import ConfigError, did_you_mean
from ferry.core.verb import discover, load_config


def check_step(document: Document, voyage: Voyage, step: Step, index: int) -> None:
    """Check references and, as far as its values are known, the verb's config."""
    place: Place = ("steps", index)
    earlier = [other.name for other in voyage.steps[:index]]
    names = voyage.names()
    known: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in step.fields.items():
        where = (*place, "with", key if (*place, "with", key) in document.lines else key.replace("_", "-"))
        origins[key] = f"{document.file.name}, line {document.line(where)}"
        if check_references(document, where, value, names, earlier) and not _steps_in(value):
            known[key] = substitute(value, partial(find, names))
    for position, word in enumerate(step.command):
        check_references(document, (*place, "command", position), word, names, earlier)
    for key, value in step.env.items():
        check_references(document, (*place, "env", key), value, names, earlier)
    if step.verb:
        _check_verb(document, place, step, known, origins)


def _check_verb(document: Document, place: Place, step: Step, known: dict[str, Any], origins: dict[str, str]) -> None:
    """Check the verb, its keys, and the values that are known; the others are known when earlier steps are done."""
    verbs = discover()
    if step.verb not in verbs:
        near = did_you_mean(step.verb, list(verbs))
        document.wrong((*place, "verb"), f"step {step.name!r}: unknown verb {step.verb!r}{near}", "run.unknown-verb")
        return
    config_class = load_config(verbs[step.verb])
    pending = step.fields.keys() - known.keys()
    layer = field_layer(verbs[step.verb], known, f"{document.file.name}, line {step.line}", origins)
    for problem in problems_of(config_class, [layer], pending):
        document.problems.append(problem._replace(text=f"step {step.name!r}: {problem.text}"))
    fields = list(config_class.model_fields)
    for key in sorted(pending.difference(fields)):
        text = f"step {step.name!r}: unknown key {key!r} from {origins[key]}{did_you_mean(key, fields)}"
        document.problems.append(Problem("config.unknown", text))


def _steps_in(value: object) -> list[str]:
    return [step_of(reference) for reference in references_in(value) if step_of(reference)]


def check_references(
    document: Document, place: Place, value: object, names: dict[str, Any], earlier: list[str]
) -> bool:
    """Return whether every reference in a value can be followed, now or when the earlier steps are done."""
    before = len(document.problems)
    for reference in references_in(value):
        if reference.partition(".")[0] == "steps":
            _check_step_reference(document, place, reference, earlier)
            continue
        try:
            find(names, reference)
        except ConfigError as error:
            document.wrong(place, f"${{{reference}}}: {error.message}", error.code)
    return len(document.problems) == before


def _check_step_reference(document: Document, place: Place, reference: str, earlier: list[str]) -> None:
    step = step_of(reference)
    later = [item.get("name") for item in document.values.get("steps", []) if isinstance(item, dict)]
    if step not in earlier:
        why = "it is not done before this" if step in later else f"there is no such step{did_you_mean(step, earlier)}"
        document.wrong(place, f"{reference}: {why}", "run.reference")
    elif reference.count(".") < 2:
        document.wrong(place, f"{reference}: name a field of its result, like {reference}.artifact", "run.reference")


def gates_of(document: Document, steps: dict[str, Step]) -> tuple[Gate, ...]:
    gates = _gate_list(document, ("gates",), document.values.get("gates"), steps, "")
    found = document.values.get("steps")
    for index, item in enumerate(found if isinstance(found, list) else []):
        if isinstance(item, dict) and item.get("gates") is not None:
            place: Place = ("steps", index, "gates")
            gates += _gate_list(document, place, item["gates"], steps, str(item.get("name")))
    return tuple(gates)


def _gate_list(document: Document, place: Place, found: object, steps: dict[str, Step], owner: str) -> list[Gate]:
    """Return the gates of a step (`owner`) or of the voyage; each comes after the last step it names."""
    if found is not None and (not isinstance(found, list) or not all(isinstance(text, str) for text in found)):
        document.wrong(place, "expected a list of conditions, each one text")
        return []
    order = list(steps)
    gates = []
    for index, text in enumerate(found or []):
        where = (*place, index)
        try:
            tree = parse(text)
        except ConfigError as error:
            document.wrong(where, error.message, error.code)
            continue
        visible = order[: order.index(owner) + 1] if owner in order else order
        named = _check_names(document, where, names_in(tree), visible)
        last = max((order.index(name) for name in named), default=len(order) - 1)
        gates.append(Gate(text, tree, owner or (order[last] if order else "")))
    return gates


def _check_names(document: Document, place: Place, names: list[str], visible: list[str]) -> list[str]:
    """Return the steps that a gate names; note names that are none."""
    for name in names:
        root = name.partition(".")[0]
        if root == "steps":
            _check_step_reference(document, place, name, visible)
        elif root != "variables":
            near = did_you_mean(root, ["steps", "variables"])
            text = f"gate: unknown name {name!r}{near}; quote text, or begin with steps. or variables."
            document.wrong(place, text, "run.unknown-name")
    return [step_of(name) for name in names if step_of(name) in visible]
