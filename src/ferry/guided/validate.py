"""The last check: a finished answer against what was asked, by other means than those that wrote it.

JSON goes through `jsonschema`, with our own patterns, formats and exact multiples, so that both sides mean the same.
Choices are compared, patterns and grammars parsed again. An answer that was cut off is invalid, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ferry.guided import regexes, texts
from ferry.guided.compiling import Compiled
from ferry.guided.values import exact

TOO_DEEP = "nested too deeply to check"


@dataclass(frozen=True)
class Verdict:
    """Whether an answer keeps its promise; if not, why, and where in the answer."""

    valid: bool
    reason: str = ""
    pointer: str = ""
    cut: bool = False


def check(compiled: Compiled, text: str, *, cut: bool = False, tokens: Sequence[int] | None = None) -> Verdict:
    """Return the verdict on a finished answer; `cut` says that a limit ended it, not the model.

    `tokens` are those of the text, where they are known: a grammar may ask for special ones, which no text shows.
    """
    form, source = compiled.constraint.form, compiled.constraint.source
    if form == "json":
        verdict = check_json(json.loads(source), text)
    elif form == "choice":
        valid = text in json.loads(source)
        verdict = Verdict(valid, "" if valid else f"{_short(text)} is none of the choices")
    else:
        verdict = _parsed_again(compiled, compiled.tokenize(text) if tokens is None else list(tokens))
    if verdict.valid or not cut:
        return verdict
    return Verdict(False, f"cut off by the limit of tokens: {verdict.reason}", verdict.pointer, cut=True)


def check_json(schema: Any, text: str) -> Verdict:
    """Return the verdict on a JSON text under a schema."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        return Verdict(False, f"not JSON: {error}")
    except RecursionError:
        return Verdict(False, TOO_DEEP)
    from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

    try:
        worst = best_match(_validator(schema).iter_errors(value))
    except RecursionError:
        return Verdict(False, TOO_DEEP)
    if worst is None:
        return Verdict(True)
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in worst.absolute_path)
    rule = "/".join(str(step) for step in worst.absolute_schema_path)
    return Verdict(False, f"{worst.message[:300]} (#/{rule})", "".join("/" + step for step in steps))


def _parsed_again(compiled: Compiled, tokens: list[int]) -> Verdict:
    """Return whether the automaton takes the tokens of a text, one by one, to an end."""
    matcher = compiled.automaton.deep_copy()
    taken = matcher.try_consume_tokens(tokens)
    if taken < len(tokens):
        return Verdict(False, f"does not match {compiled.constraint.field} from token {taken} of {len(tokens)} on")
    return Verdict(True) if matcher.is_accepting() else Verdict(False, f"ends before {compiled.constraint.field} does")


def _validator(schema: Any) -> Any:
    import jsonschema  # type: ignore[import-untyped]
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

    draft = schema.get("$schema") if isinstance(schema, dict) else None
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return _with_our_words(kind, old_words=draft is None)(schema, registry=REGISTRY)


@lru_cache(maxsize=16)
def _with_our_words(kind: Any, old_words: bool) -> Any:
    """Return a class of validators that means by each word what the grammar means by it."""
    import jsonschema

    words: dict[str, Any] = {"pattern": _pattern, "format": _format, "multipleOf": _multiple_of}
    words["patternProperties"], words["additionalProperties"] = _pattern_properties, _additional_properties
    if old_words:
        old = jsonschema.Draft7Validator.VALIDATORS
        new_items = kind.VALIDATORS["items"]

        def items(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            check = old["items"] if isinstance(value, list) else new_items
            yield from check(validator, value, instance, schema) or ()

        def additional_items(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            if isinstance(schema.get("items"), list):
                yield from old["additionalItems"](validator, value, instance, schema) or ()

        words |= {"items": items, "additionalItems": additional_items, "dependencies": old["dependencies"]}
    return jsonschema.validators.extend(kind, words)


def _pattern(validator: Any, value: str, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, str) and not regexes.search(value, instance):
        yield _error(f"{_short(instance)} does not match {value!r}")


def _format(validator: Any, value: str, instance: Any, schema: Any) -> Iterator[Any]:
    name = texts.NARROWED.get(value, value)
    if isinstance(instance, str) and name in texts.FORMATS and not regexes.search(texts.format_pattern(name), instance):
        yield _error(f"{_short(instance)} is no {value!r}")


def _multiple_of(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    is_number = isinstance(instance, (int, float)) and not isinstance(instance, bool)
    if is_number and (exact(instance) / exact(value)).denominator != 1:
        yield _error(f"{instance!r} is not a multiple of {value!r}")


def _pattern_properties(validator: Any, value: dict[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    for pattern, inner in value.items() if isinstance(instance, dict) else ():
        for name, one in instance.items():
            if regexes.search(pattern, name):
                yield from validator.descend(one, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, one in instance.items() if isinstance(instance, dict) else ():
        if name in known or any(regexes.search(pattern, name) for pattern in patterns):
            continue
        if value is False:
            yield _error(f"{_short(name)} is no property of this schema")
        else:
            yield from validator.descend(one, value, path=name)


def _error(message: str) -> Any:
    from jsonschema import ValidationError

    return ValidationError(message)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
