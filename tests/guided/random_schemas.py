"""Random schemas of every keyword we enforce, and random values that come near them."""

from __future__ import annotations

from random import Random
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 1.5, -1, "", "a", "b", "ab", 'x\n"\\', [], [1], ["a", "b"], [1, 1], [True, 1], {},
    {"a": 1}, {"b": "a"}, {"a": 1, "b": 2},
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, -1, 10, 0.5, 1.5, 2.5, -0.5, 100, 0.1, 0.3, -2, 4]
NAMES = ["a", "b", "ab", "c"]
TYPES: list[Any] = [
    "null", "boolean", "number", "integer", "string", "array", "object", ["string", "null"], ["integer", "string"],
    ["object", "array"],
]  # fmt: skip
PATTERNS = ["^a", "b$", "a", "^[ab]*$", "^.{2}$", "[^a]", "\\d", "^$", "\\s", '^(a|"b")', "\\\\"]
NESTING = [
    "properties", "additionalProperties", "patternProperties", "propertyNames", "items", "prefixItems", "contains",
    "anyOf", "oneOf", "allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
]  # fmt: skip
FLAT = [
    "type", "type", "type", "enum", "const", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf",
    "minLength", "maxLength", "pattern", "required", "minProperties", "maxProperties", "minItems", "maxItems",
    "uniqueItems", "dependentRequired", "$ref",
]  # fmt: skip


def schema(random: Random) -> Any:
    """Return a schema with two definitions that it may refer to."""
    root = _schema(random, 0)
    return {**root, "$defs": {"x": _schema(random, 1), "y": _schema(random, 2)}} if isinstance(root, dict) else root


def value(random: Random, depth: int = 0) -> Any:
    """Return a JSON value."""
    way = random.random()
    if way < 0.5 or depth > 2:
        return random.choice(VALUES)
    if way < 0.6:
        return random.choice(NUMBERS)
    if way < 0.7:
        return "".join(random.choice('ab1 "\\\nc') for _ in range(random.randint(0, 4)))
    if way < 0.85:
        return [value(random, depth + 1) for _ in range(random.randint(0, 4))]
    names = (random.choice([*NAMES, "d", "ba", ""]) for _ in range(random.randint(0, 4)))
    return {name: value(random, depth + 1) for name in names}


def _schema(random: Random, depth: int) -> Any:
    if random.random() < 0.06:
        return random.choice([True, True, False, {}])
    out: dict[str, Any] = {}
    for _ in range(random.choice([1, 1, 2, 2, 3])):
        word = random.choice(FLAT if depth > 2 or random.random() < 0.5 else NESTING)
        if word in NESTING:
            _nest(random, out, word, depth)
        elif word != "$ref" or depth > 0:
            _add(random, out, word)
    return out


def _add(random: Random, out: dict[str, Any], word: str) -> None:
    if word == "uniqueItems":
        out |= {"uniqueItems": True, "items": {"enum": [random.choice(VALUES) for _ in range(3)]}}
        return
    choices: dict[str, Any] = {
        "type": TYPES,
        "enum": [[random.choice(VALUES) for _ in range(random.randint(1, 4))]],
        "const": VALUES,
        "minimum": NUMBERS,
        "exclusiveMinimum": NUMBERS,
        "maximum": NUMBERS,
        "exclusiveMaximum": NUMBERS,
        "multipleOf": [1, 2, 0.5, 0.1, 3, 10],
        "pattern": PATTERNS,
        "required": [[random.choice(NAMES)], ["a", "b"]],
        "dependentRequired": [{random.choice(NAMES): [random.choice(NAMES)]}],
        "$ref": ["#", "#/$defs/x", "#/$defs/y"],
    }
    out[word] = random.choice(choices.get(word, [0, 1, 2, 3]))


def _nest(random: Random, out: dict[str, Any], word: str, depth: int) -> None:
    def inner() -> Any:
        return _schema(random, depth + 1)

    if word == "properties":
        out[word] = {random.choice(NAMES): inner() for _ in range(random.randint(1, 3))}
    elif word == "dependentSchemas":
        out[word] = {random.choice(NAMES): inner()}
    elif word == "patternProperties":
        out[word] = {random.choice(["^a", "b", "c$", "^[ab]+$"]): inner()}
    elif word == "propertyNames":
        out[word] = random.choice([{"maxLength": 1}, {"pattern": "^a"}, {"enum": ["a", "b"]}, inner()])
    elif word in ("anyOf", "oneOf", "allOf"):
        out[word] = [inner() for _ in range(random.randint(1, 3))]
    elif word == "prefixItems":
        out[word] = [inner() for _ in range(random.randint(1, 2))]
    else:
        out[word] = inner()
    if word == "if":
        out |= {"then": inner(), "else": inner()}
    if word == "contains" and random.random() < 0.5:
        out[random.choice(["minContains", "maxContains"])] = random.randint(0, 2)
