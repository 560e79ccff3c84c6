"""Which fields ask for what, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ferry.guided.refusal import Refusal
from ferry.guided.request import constraint_of, is_like_a_constraint

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("request_", "form"),
    [
        ({"guided_json": SCHEMA}, "json"),
        ({"guided_json": json.dumps(SCHEMA)}, "json"),
        ({"guided_choice": ["yes", "no", "yes"]}, "choice"),
        ({"guided_regex": "[a-z]+"}, "regex"),
        ({"guided_grammar": 'root ::= "a"'}, "grammar"),
        ({"structured_outputs": {"json": SCHEMA}}, "json"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice"),
        ({"structured_outputs": {"regex": "a"}}, "regex"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar"),
        ({"structured_outputs": {"json_object": True}}, "json"),
        ({"response_format": {"type": "json_object"}}, "json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, "json"),
        ({"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}, "structural_tag"),
    ],
)
def test_each_way_to_ask_is_understood(request_: dict[str, Any], form: str) -> None:
    constraint = constraint_of({"model": "m", "prompt": "p", **request_})
    assert constraint is not None
    assert constraint.form == form
    assert constraint.field.partition(".")[0] in request_


def test_a_schema_as_text_and_as_object_are_one_constraint() -> None:
    as_text, as_object = (constraint_of({"guided_json": one}) for one in (json.dumps(SCHEMA), SCHEMA))
    assert as_text == as_object


@pytest.mark.parametrize(
    "request_", [{}, {"response_format": {"type": "text"}}, {"guided_json": None, "guided_choice": None}]
)
def test_no_constraint_is_no_constraint(request_: dict[str, Any]) -> None:
    assert constraint_of(request_) is None


def test_the_backend_of_old_requests_is_named_in_a_note() -> None:
    constraint = constraint_of({"guided_json": SCHEMA, "guided_decoding_backend": "outlines"})
    assert constraint is not None
    assert "outlines" in constraint.notes[0]


@pytest.mark.parametrize(
    ("request_", "code", "part"),
    [
        ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "guided.two", "guided_json and guided_choice"),
        ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "guided.two", "response_format"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "guided.two", "structured_outputs.regex"),
        ({"guided_jsno": SCHEMA}, "guided.unknown_field", "did you mean 'guided_json'?"),
        ({"json_schema": SCHEMA}, "guided.unknown_field", "'guided_json'"),
        ({"grammar": "x"}, "guided.unknown_field", "'guided_grammar'"),
        ({"ebnf": "x"}, "guided.unknown_field", "'guided_grammar'"),
        ({"format": "json"}, "guided.unknown_field", "'format'"),
        ({"extra_body": {"guided_json": SCHEMA}}, "guided.field", "beside 'model'"),
        ({"guided_json": "{"}, "guided.field", "is not JSON"),
        ({"guided_json": 3}, "guided.field", "must be an object"),
        ({"guided_json": {"minimum": float("inf")}}, "guided.field", "is not JSON"),
        ({"guided_choice": []}, "guided.field", "at least one"),
        ({"guided_choice": ["a", 1]}, "guided.field", "at least one"),
        ({"guided_choice": "yes"}, "guided.field", "list"),
        ({"guided_regex": ""}, "guided.field", "not empty"),
        ({"structured_outputs": {}}, "guided.field", "asks for nothing"),
        ({"structured_outputs": {"jsn": SCHEMA}}, "guided.field", "did you mean 'json'?"),
        ({"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}}, "guided.field", "false"),
        ({"response_format": {"type": "xml"}}, "guided.field", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "guided.field", "missing"),
        ({"response_format": "json"}, "guided.field", "response_format"),
        ({"guided_whitespace_pattern": " ?"}, "guided.field", "without a JSON constraint"),
        ({"guided_whitespace_pattern": ".*", "guided_json": SCHEMA}, "guided.field", "more than space"),
        ({"guided_whitespace_pattern": "[^a]", "guided_json": SCHEMA}, "guided.field", "more than space"),
        ({"guided_whitespace_pattern": "^ $", "guided_json": SCHEMA}, "guided.field", "more than space"),
        ({"guided_whitespace_pattern": " ", "guided_regex": "a"}, "guided.field", "not JSON"),
        ({"guided_json": '"' + "x" * 2_000_000 + '"'}, "guided.field", "object"),
        ({"guided_json": {"description": "x" * 2_000_000}}, "guided.too_large", "guided_json"),
    ],
)
def test_what_is_not_right_is_refused_by_name(request_: dict[str, Any], code: str, part: str) -> None:
    with pytest.raises(Refusal) as caught:
        constraint_of(request_)
    assert caught.value.code == code
    assert part in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("field", ["guided_foo", "structured_outputz", "regex", "response_schema"])
def test_a_field_that_looks_like_a_constraint_is_known_as_one(field: str) -> None:
    assert is_like_a_constraint(field)


@pytest.mark.parametrize("field", ["temperature", "guided_json", "response_format", "max_tokens", "stop"])
def test_other_fields_do_not_look_like_a_constraint(field: str) -> None:
    assert not is_like_a_constraint(field)


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(5000):
        schema = {"properties": {"a": schema}}
    with pytest.raises(Refusal, match="nested too deeply"):
        constraint_of({"guided_json": schema})
