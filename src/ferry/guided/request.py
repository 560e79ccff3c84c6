"""What a request asks of its answer, out of all the names that fields have had: old vLLM, new vLLM, OpenAI.

One constraint or none comes out. Two at once, a wrong value, or a field that looks like a constraint but is none of
ours are errors: an answer without the promise would be worse than no answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ferry.core.errors import did_you_mean
from ferry.guided import regexes
from ferry.guided.refusal import Refusal

Form = Literal["json", "choice", "regex", "grammar", "structural_tag"]

FORMS: dict[str, Form] = {
    "guided_json": "json",
    "guided_choice": "choice",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
}
FIELDS = frozenset(
    {*FORMS, "guided_whitespace_pattern", "guided_decoding_backend", "structured_outputs", "response_format"}
)
STRUCTURED = frozenset(
    {"json", "choice", "regex", "grammar", "json_object", "structural_tag", "whitespace_pattern", "disable_fallback",
     "disable_any_whitespace", "disable_additional_properties"}
)  # fmt: skip
LIKE_A_CONSTRAINT = frozenset(
    {"grammar", "json_schema", "regex", "ebnf", "lark", "gbnf", "schema", "choice", "choices", "format", "json",
     "structural_tag", "structured_output", "response_schema", "output_schema", "json_object", "constraint"}
)  # fmt: skip
MAX_BYTES = 1_000_000
MAX_CHOICES = 10_000
WHITESPACE = frozenset(" \t\n\r")


@dataclass(frozen=True)
class Constraint:
    """What an answer must be. `source` is JSON text for json, choice and structural_tag, else as it was given."""

    form: Form
    source: str
    field: str
    whitespace: str | None = None
    notes: tuple[str, ...] = ()


def constraint_of(request: Mapping[str, Any]) -> Constraint | None:
    """Return the constraint in the fields of a request, or nothing if it asks for plain text."""
    _refuse_unknown(request)
    found = [*_of_guided(request), *_of_structured(request.get("structured_outputs")), *_of_response_format(request)]
    if len(found) > 1:
        names = " and ".join(one.field for one in found)
        raise Refusal(
            f"{names} are given, and an answer can follow only one", code="guided.two", repair="leave one out"
        )
    whitespace = _whitespace(request)
    notes = _notes(request)
    if not found:
        if whitespace is not None:
            raise _wrong("guided_whitespace_pattern", "is given without a JSON constraint", "add guided_json")
        return None
    one = found[0]
    if whitespace is not None and one.form != "json":
        raise _wrong("guided_whitespace_pattern", f"is given beside {one.field}, which is not JSON", "leave it out")
    return Constraint(one.form, one.source, one.field, whitespace, notes)


def is_like_a_constraint(field: str) -> bool:
    """Return whether a field looks as if it asked for a form of the answer."""
    return field not in FIELDS and (field in LIKE_A_CONSTRAINT or field.startswith(("guided", "structured_")))


def _refuse_unknown(request: Mapping[str, Any]) -> None:
    for field, value in request.items():
        if field == "extra_body" and isinstance(value, Mapping):
            inner = [name for name in value if name in FIELDS or is_like_a_constraint(name)]
            if inner:
                raise _wrong(f"extra_body.{inner[0]}", "would be ignored", f"put {inner[0]!r} beside 'model'")
        if is_like_a_constraint(field) and value is not None:
            near = did_you_mean(field, sorted(FIELDS)) or _meant(field)
            raise Refusal(
                f"{field!r} looks like a constraint and is not a field of this server{near}",
                code="guided.unknown_field",
                repair="nothing is ever ignored that would change the form of the answer",
                keyword=field,
            )


def _meant(field: str) -> str:
    meant = "guided_grammar" if field in {"ebnf", "lark", "gbnf"} else "guided_json"
    return f" (did you mean {meant!r}?)"


def _of_guided(request: Mapping[str, Any]) -> list[Constraint]:
    return [
        Constraint(form, _source(form, request[field], field), field)
        for field, form in FORMS.items()
        if request.get(field) is not None
    ]


def _of_structured(value: Any) -> list[Constraint]:
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise _wrong("structured_outputs", "must be an object", 'for example {"choice": ["yes", "no"]}')
    for name in value:
        if name not in STRUCTURED:
            near = did_you_mean(name, sorted(STRUCTURED))
            raise _wrong(f"structured_outputs.{name}", f"is no field{near}", f"known: {', '.join(sorted(STRUCTURED))}")
    if value.get("disable_additional_properties"):
        raise _wrong(
            "structured_outputs.disable_additional_properties",
            "would change the schema",
            'say "additionalProperties": false in it',
        )
    found: list[Constraint] = []
    for name in ("json", "choice", "regex", "grammar", "structural_tag"):
        if value.get(name) is not None:
            field = f"structured_outputs.{name}"
            form: Form = name  # type: ignore[assignment]
            found.append(Constraint(form, _source(form, value[name], field), field))
    if value.get("json_object"):
        found.append(Constraint("json", '{"type":"object"}', "structured_outputs.json_object"))
    if not found:
        raise _wrong("structured_outputs", "asks for nothing", "give one of json, choice, regex, grammar")
    return found


def _of_response_format(request: Mapping[str, Any]) -> list[Constraint]:
    value = request.get("response_format")
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [Constraint("json", '{"type":"object"}', "response_format")]
    if kind == "structural_tag":
        return [Constraint("structural_tag", _source("structural_tag", value, "response_format"), "response_format")]
    if kind != "json_schema":
        known = "text, json_object, json_schema, structural_tag"
        raise _wrong("response_format.type", f"is {kind!r}", f"use one of {known}")
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if schema is None:
        raise _wrong("response_format.json_schema.schema", "is missing", "give the schema there")
    return [Constraint("json", _source("json", schema, "response_format"), "response_format")]


def _source(form: Form, value: Any, field: str) -> str:
    """Return the text of a constraint, after a look at its type and size."""
    if form in ("regex", "grammar"):
        if not isinstance(value, str) or not value:
            raise _wrong(field, "must be a text that is not empty", "")
        return _small(value, field)
    if form == "choice":
        return _choice(value, field)
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        value = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _wrong(field, f"is not JSON: {error}", "send the object itself or its JSON text") from error
    except RecursionError as error:
        raise Refusal(f"{field} is nested too deeply", code="guided.too_large", keyword=field) from error
    if not isinstance(value, (dict, bool)) or (form == "structural_tag" and not isinstance(value, dict)):
        raise _wrong(field, "must be an object or its JSON text", "")
    return _small(text, field)


def _choice(value: Any, field: str) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise _wrong(field, "must be a list of at least one text, none of them empty", 'for example ["yes", "no"]')
    if len(value) > MAX_CHOICES:
        raise _wrong(field, f"has {len(value)} choices, more than {MAX_CHOICES}", "use a grammar")
    return _small(json.dumps(list(dict.fromkeys(value)), ensure_ascii=False), field)


def _small(text: str, field: str) -> str:
    if len(text) > MAX_BYTES:
        raise Refusal(f"{field} has {len(text)} characters, more than {MAX_BYTES}", code="guided.too_large")
    return text


def _whitespace(request: Mapping[str, Any]) -> str | None:
    structured = request.get("structured_outputs")
    inner = structured.get("whitespace_pattern") if isinstance(structured, Mapping) else None
    field = "guided_whitespace_pattern" if inner is None else "structured_outputs.whitespace_pattern"
    pattern = request.get("guided_whitespace_pattern") if inner is None else inner
    if pattern is None:
        return None
    if not isinstance(pattern, str):
        raise _wrong(field, "must be a pattern", "for example '[ \\n]?'")
    try:
        tree = regexes.parse(pattern)
    except regexes.PatternError as error:
        raise _wrong(field, f"cannot be used: {error}", "") from error
    if not all(_is_blank(chars) for chars in regexes.alphabet(tree)) or regexes.has_edges(tree):
        raise _wrong(field, "may match more than space, tab and line ends", "for example '[ \\n]?'")
    # `\s` is wider than the whitespace of JSON.
    return pattern.replace("\\s", "[ \\t\\n\\r]") or None


def _is_blank(chars: regexes.Chars) -> bool:
    if chars.ranges == regexes.SPACE and not chars.negated:
        return True
    plain = not chars.negated and not chars.categories
    return plain and all(
        high - low < 8 and all(chr(point) in WHITESPACE for point in range(low, high + 1)) for low, high in chars.ranges
    )


def _notes(request: Mapping[str, Any]) -> tuple[str, ...]:
    backend = request.get("guided_decoding_backend")
    if backend is None:
        return ()
    if not isinstance(backend, str):
        raise _wrong("guided_decoding_backend", "must be a text", "leave it out")
    return (f"guided_decoding_backend {backend!r} is not needed: llguidance does all guided decoding here",)


def _wrong(field: str, message: str, repair: str) -> Refusal:
    return Refusal(f"{field} {message}", code="guided.field", repair=repair, keyword=field)
