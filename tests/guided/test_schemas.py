"""Schemas as people write them, each with answers that keep the promise and answers that break it."""

from __future__ import annotations

import datetime
import enum
import json
import uuid
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from ferry.guided.refusal import Refusal
from ferry.guided.validate import check_json
from guided.writing import accepts, automaton

MANUAL = {
    "title": "Character",
    "type": "object",
    "properties": {
        "name": {"title": "Name", "maxLength": 10, "type": "string"},
        "age": {"title": "Age", "type": "integer"},
        "armor": {"$ref": "#/definitions/Armor"},
        "weapon": {"$ref": "#/definitions/Weapon"},
        "strength": {"title": "Strength", "type": "integer"},
    },
    "required": ["name", "age", "armor", "weapon", "strength"],
    "definitions": {
        "Armor": {"description": "An enumeration.", "enum": ["leather", "chainmail", "plate"], "type": "string"},
        "Weapon": {"enum": ["sword", "axe", "mace", "spear", "bow", "crossbow"], "type": "string"},
    },
}
KNIGHT = {"name": "Knight", "age": 32, "armor": "plate", "weapon": "sword", "strength": 90}


class Colour(enum.Enum):
    red = "red"
    blue = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    tags: list[Colour] = Field(default=[], max_length=3)


class Person(BaseModel):
    model_config = {"extra": "forbid"}
    name: str = Field(min_length=1, max_length=40, pattern=r"^[A-Z][a-z]+( [A-Z][a-z]+)*$")
    born: datetime.date
    id: uuid.UUID
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]]
    children: list[Person] = []
    price: float = Field(default=1, gt=0, lt=1000, multiple_of=0.01)
    colours: set[Colour] = set()
    pair: tuple[int, str] = (1, "x")


PERSON = {
    "name": "Ada Lovelace",
    "born": "2024-02-29",
    "id": "123e4567-e89b-12d3-a456-426614174000",
    "pets": [{"kind": "cat", "lives": 9}, {"kind": "dog", "tags": ["red"]}],
    "children": [],
    "price": 999.99,
    "colours": ["blue", "red"],
    "pair": [3, "y"],
}


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"name": "Sir Lancelot"}, False),
        ({"age": 3.5}, False),
        ({"age": "32"}, False),
        ({"armor": "cloth"}, False),
        ({"weapon": "crossbow", "strength": -1}, True),
    ],
)
def test_the_schema_of_the_manual_is_kept(change: dict[str, Any], valid: bool) -> None:
    text = compact(KNIGHT | change)
    assert accepts(automaton(MANUAL), text) is valid
    assert check_json(MANUAL, text).valid is valid


def test_names_that_a_schema_does_not_list_are_written_only_where_it_asks_for_them() -> None:
    more = compact(KNIGHT | {"bonus": 1})
    assert check_json(MANUAL, more).valid
    assert not accepts(automaton(MANUAL, unlisted=False), more)
    assert accepts(automaton(MANUAL, unlisted=False), compact(KNIGHT))
    for others, wanted in ((True, 1), ({}, 1), ({"type": "integer"}, 1), ({"type": "string"}, "x")):
        schema = MANUAL | {"additionalProperties": others}
        assert accepts(automaton(schema, unlisted=False), compact(KNIGHT | {"bonus": wanted})), others


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object"}, '{"a":1}'),
        ({"type": "object", "minProperties": 1}, '{"z":0}'),
        ({"properties": {"a": {"const": 1}}, "required": ["a", "b"]}, '{"a":1,"b":2}'),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, '{"x1":1,"y":2}'),
    ],
)
def test_names_are_still_written_where_nothing_is_listed_or_more_are_needed(schema: Any, text: str) -> None:
    assert accepts(automaton(schema, unlisted=False), text)


def test_a_required_property_cannot_be_left_out() -> None:
    without = {name: value for name, value in KNIGHT.items() if name != "strength"}
    assert not accepts(automaton(MANUAL), compact(without))


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"name": "ada"}, False),
        ({"born": "2023-02-29"}, False),
        ({"born": "2000-02-29"}, True),
        ({"born": "1900-02-29"}, False),
        ({"id": "123e4567"}, False),
        ({"pets": [{"kind": "cat", "lives": 10}]}, False),
        ({"pets": [{"kind": "fish"}]}, False),
        ({"pets": [{"kind": "dog", "tags": ["red", "red", "red", "red"]}]}, False),
        ({"price": 0}, False),
        ({"price": 0.001}, False),
        ({"price": 1000}, False),
        ({"colours": ["red", "red"]}, False),
        ({"pair": [1]}, False),
        ({"pair": [1, "a", 2]}, False),
        ({"more": 1}, False),
        ({"children": [{**PERSON, "name": "Byron"}]}, True),
        ({"children": [{**PERSON, "price": -1}]}, False),
    ],
)
def test_what_pydantic_says_is_kept(change: dict[str, Any], valid: bool) -> None:
    schema, text = Person.model_json_schema(), compact(PERSON | change)
    assert accepts(automaton(schema), text) is valid
    assert check_json(schema, text).valid is valid


@pytest.mark.parametrize(
    "text",
    ['{"\\u0061":1}', '{"a":1}', '{"a":"x","a":1}', '{"b":"x"}'],
)
def test_a_named_property_cannot_come_in_by_another_spelling(text: str) -> None:
    schema = {"properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    assert not accepts(automaton({"type": "object", **schema}), text)


def test_a_property_that_must_be_there_is_not_undone_by_its_own_name() -> None:
    schema = {"type": "object", "not": {"additionalProperties": {"type": "integer"}}}
    assert accepts(automaton(schema), '{"b":1,"a":"x"}')
    assert not accepts(automaton(schema), '{"a":"x","a":1}')


@pytest.mark.parametrize("text", ["2.99999999999999999999", "3.0", "3"])
def test_no_number_slips_over_its_limit_when_it_is_read_as_a_float(text: str) -> None:
    schema = {"type": "number", "exclusiveMaximum": 3}
    assert not accepts(automaton(schema), text)
    assert not check_json(schema, text).valid


def test_limits_beyond_64_bit_floats_are_exact() -> None:
    matcher = automaton({"type": "integer", "minimum": 9007199254740993})
    assert accepts(matcher, "9007199254740993")
    assert not accepts(matcher, "9007199254740992")


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"if": {"properties": {"a": {"const": 1}}, "required": ["a"]}, "then": {"required": ["b"]}},
         ['{"a":2}', '{"a":1,"b":0}'], ['{"a":1}']),
        ({"dependencies": {"a": ["b"], "c": {"properties": {"d": {"type": "null"}}}}},
         ['{"a":1,"b":1}', '{"c":1,"d":null}'], ['{"a":1}', '{"c":1,"d":1}']),
        ({"not": {"enum": ["a", 5, None]}}, ['"b"', "4", "5.5", "true"], ['"a"', "5", "null"]),
        ({"not": {"required": ["a"]}}, ["{}", '{"b":1}'], ['{"a":1}', "7"]),
        ({"propertyNames": {"pattern": "^x-"}}, ['{"x-a":1}'], ['{"a":1}']),
        ({"type": "array", "contains": {"const": "x"}}, ['["x"]', '[1,"x",2]'], ["[]", "[1]"]),
        ({"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 2},
         ['["a","c"]', '["c","b","a"]'], ['["a"]', '["a","a"]', '["a","b","a"]']),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, ["1", "2.5", "2.25"], ["3", "1.5"]),
        ({"minLength": 2}, ['"ab"', "1", "[]"], ['"a"']),
        ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["c"], "maxProperties": 2,
          "additionalProperties": False}, ['{"a":1,"c":1}', '{"c":1}'], ['{"a":1,"b":1,"c":1}', '{"a":1,"b":1}']),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}}], "unevaluatedProperties": False},
         ['{"a":1}', "{}"], ['{"b":1}', '{"a":"x"}']),
        ({"type": "string", "pattern": '"\\n$'}, ['"say \\"\\n"'], ['"say"', '"\\n"']),
        ({"type": "string", "not": {"pattern": "^a"}}, ['"b"', '""', '"\\n"'], ['"a"', '"ab"']),
        ({"patternProperties": {"^n": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
         ['{"n":1,"a":"x"}', '{"\\n":"x"}'], ['{"n":"x"}', '{"a":1}']),
        ({"items": [{"type": "integer"}, {"type": "string"}], "additionalItems": False},
         ["[]", '[1,"a"]'], ['["a"]', '[1,"a",2]']),
        ({"type": "integer", "multipleOf": 7, "minimum": 8}, ["14", "700"], ["7", "15"]),
        ({"const": {"b": [1, "é"], "a": None}}, ['{"a":null,"b":[1,"é"]}'], ['{"a":null,"b":[1]}', "{}"]),
    ],
)  # fmt: skip
def test_a_keyword_that_automata_do_not_know_is_rewritten(
    schema: dict[str, Any], inside: list[str], outside: list[str]
) -> None:
    matcher = automaton(schema)
    assert [text for text in inside if not accepts(matcher, text)] == []
    assert [text for text in outside if accepts(matcher, text)] == []
    assert [text for text in inside if not check_json(schema, text).valid] == []
    assert [text for text in outside if check_json(schema, text).valid] == []


@pytest.mark.parametrize(
    ("schema", "code", "keyword", "pointer"),
    [
        ({"properties": {"/": {"not": {"pattern": "(?=a)"}}}}, "guided.unsupported", "pattern", "#/properties/~1/not"),
        ({"items": {"type": "array", "uniqueItems": True}}, "guided.unsupported", "uniqueItems", "#/items"),
        ({"not": {"uniqueItems": True}}, "guided.unsupported", "uniqueItems", "#/not"),
        ({"type": "object", "minProperties": 2}, "guided.unsupported", "minProperties", "#"),
        ({"$dynamicRef": "#x"}, "guided.unsupported", "$dynamicRef", "#"),
        ({"type": "string", "format": "regex"}, "guided.unsupported", "format", "#"),
        ({"$ref": "#"}, "guided.unsupported", "$ref", "#"),
        ({"$schema": "https://example.com/mine"}, "guided.unsupported", "$schema", "#"),
        ({"type": "integer", "multipleOf": 123457}, "guided.unsupported", "multipleOf", "#"),
        ({"items": {"$ref": "https://example.com/x"}}, "guided.schema", "$ref", "#/items"),
        ({"items": {"requried": ["a"]}}, "guided.schema", "requried", "#/items"),
        ({"type": "strin"}, "guided.schema", "type", "#"),
        ({"minLength": -1}, "guided.schema", "minLength", "#"),
        ({"anyOf": []}, "guided.schema", "anyOf", "#"),
        ({"properties": {"a": 5}}, "guided.schema", "", "#/properties/a"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_with_keyword_and_place(
    schema: dict[str, Any], code: str, keyword: str, pointer: str
) -> None:
    with pytest.raises(Refusal) as caught:
        automaton(schema)
    assert (caught.value.code, caught.value.keyword, caught.value.pointer) == (code, keyword, pointer)
    assert pointer in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"type": "string", "minLength": 2, "maxLength": 1},
        {"type": "string", "pattern": "^[0-9]+$", "not": {"minLength": 1}},
        {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": False, "minItems": 1},
    ],
)
def test_a_schema_without_any_value_is_refused(schema: Any) -> None:
    with pytest.raises(Refusal, match="no JSON value"):
        automaton(schema)
