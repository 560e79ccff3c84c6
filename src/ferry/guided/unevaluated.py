"""`unevaluatedProperties` and `unevaluatedItems`: what no other keyword has looked at.

A schema is parted into branches, one for each way to satisfy its alternatives, and each branch knows what it looks at.
There is a branch for every choice of alternatives that may hold together. A value that is in more alternatives than its
branch says is judged too strictly there, and rightly in another branch: the union is exact, and nothing is negated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ferry.guided.refusal import cannot_enforce
from ferry.guided.shapes import (
    ANY,
    EVERY_KIND,
    NEVER,
    Array,
    Object,
    One,
    Only,
    Place,
    Rule,
    Shape,
    Text,
    every,
    having,
    one_name,
    outside,
    some,
)

if TYPE_CHECKING:
    from ferry.guided.reading import Reader

MAX_BRANCHES = 64


@dataclass(frozen=True)
class Seen:
    """What the keywords of a branch look at: property names, the first items, items of some kinds."""

    keys: Shape = NEVER
    first: int = 0
    items: Shape = NEVER


@dataclass(frozen=True)
class Branch:
    shape: Shape
    seen: Seen


def properties(reader: Reader) -> Shape:
    """Return what `unevaluatedProperties` says beside its neighbours."""
    value = reader.child(reader.schema["unevaluatedProperties"], "unevaluatedProperties")
    return _unless(
        Object,
        [
            every(branch.shape, Only(Object(rules=(Rule(outside(branch.seen.keys), value),))))
            for branch in _branches(reader, "unevaluatedProperties", ())
        ],
    )


def items(reader: Reader) -> Shape:
    """Return what `unevaluatedItems` says beside its neighbours."""
    value = reader.child(reader.schema["unevaluatedItems"], "unevaluatedItems")
    return _unless(
        Array,
        [
            every(branch.shape, Only(Array((ANY,) * branch.seen.first, some(value, branch.seen.items))))
            for branch in _branches(reader, "unevaluatedItems", ())
        ],
    )


def _unless(kind: type, branches: list[Shape]) -> Shape:
    return some(*(Only(other) for other in EVERY_KIND if not isinstance(other, kind)), *branches)


def _branches(reader: Reader, own: str, path: tuple[str, ...]) -> list[Branch]:
    """Return the branches of one schema; `own` is the keyword being worked out, which looks at nothing yet."""
    if reader.pointer in path:
        raise cannot_enforce("$ref", reader.pointer, "a reference leads back to itself beside unevaluated parts")
    path = (*path, reader.pointer)
    found = [Branch(ANY, _looked_at(reader, own))]
    for factor in _factors(reader, path):
        found = [_both(one, other) for one, other in itertools.product(found, factor)]
        if len(found) > MAX_BRANCHES:
            raise cannot_enforce(
                own or "anyOf", reader.pointer, f"more than {MAX_BRANCHES} ways to satisfy its neighbours"
            )
    return found


def _factors(reader: Reader, path: tuple[str, ...]) -> list[list[Branch]]:
    """Return, for each neighbour that applies schemas to the same value, its branches."""
    schema, factors = reader.schema, []
    if "$ref" in schema:
        factors.append(_of_shape(reader, reader.reference(), path))
    for index, part in enumerate(schema.get("allOf", [])):
        factors.append(_of(reader, part, ("allOf", str(index)), path))
    if "anyOf" in schema:
        parts = [_of(reader, part, ("anyOf", str(index)), path) for index, part in enumerate(schema["anyOf"])]
        factors.append(_any_of(reader, parts))
    if "oneOf" in schema:
        children = [reader.child(part, "oneOf", str(index)) for index, part in enumerate(schema["oneOf"])]
        exactly = One(tuple(children))
        factors.append(
            [
                Branch(every(one.shape, exactly), one.seen)
                for child in children
                for one in _of_shape(reader, child, path)
            ]
        )
    if "if" in schema:
        test = _of(reader, schema["if"], ("if",), path)
        then = _of(reader, schema.get("then", True), ("then",), path)
        failed = outside(reader.child(schema["if"], "if"))
        otherwise = _of(reader, schema.get("else", True), ("else",), path)
        both = [_both(one, other) for one, other in itertools.product(test, then)]
        factors.append([*both, *(Branch(every(failed, one.shape), one.seen) for one in otherwise)])
    for name, part in reader.table("dependentSchemas").items():
        without = Branch(_unless(Object, [Only(Object(rules=(Rule(one_name(name), NEVER),)))]), Seen())
        other = _of(reader, part, ("dependentSchemas", name), path)
        factors.append([without, *(Branch(every(having(name), one.shape), one.seen) for one in other)])
    return factors


def _any_of(reader: Reader, parts: list[list[Branch]]) -> list[Branch]:
    """Return the branches of each choice of alternatives that hold together."""
    found: list[Branch] = []
    for part in parts:
        found += [*part, *(_both(one, other) for one, other in itertools.product(found, part) if other.seen != Seen())]
        if len(found) > MAX_BRANCHES:
            raise cannot_enforce(
                "anyOf", reader.pointer, f"more than {MAX_BRANCHES} ways to satisfy it beside unevaluated parts"
            )
    return found


def _of(reader: Reader, schema: Any, steps: tuple[str, ...], path: tuple[str, ...]) -> list[Branch]:
    return _of_shape(reader, reader.child(schema, *steps), path)


def _of_shape(reader: Reader, shape: Shape, path: tuple[str, ...]) -> list[Branch]:
    if shape == NEVER:
        return []
    if not isinstance(shape, Place):
        return [Branch(shape, Seen())]
    inner = reader.document.reader(shape.number)
    return [Branch(every(shape, one.shape), one.seen) for one in _branches(inner, "", path)]


def _both(one: Branch, other: Branch) -> Branch:
    seen = Seen(
        some(one.seen.keys, other.seen.keys),
        max(one.seen.first, other.seen.first),
        some(one.seen.items, other.seen.items),
    )
    return Branch(every(one.shape, other.shape), seen)


def _looked_at(reader: Reader, own: str) -> Seen:
    schema = reader.schema
    keys: list[Shape] = [one_name(name) for name in reader.table("properties")]
    keys += [Only(Text(patterns=frozenset({text}))) for text in reader.table("patternProperties")]
    if "additionalProperties" in schema or ("unevaluatedProperties" in schema and own != "unevaluatedProperties"):
        keys.append(ANY)
    listed = schema.get("items")
    first = schema.get("prefixItems", listed if isinstance(listed, list) else [])
    kinds: list[Shape] = []
    rest = "additionalItems" if isinstance(listed, list) else "items"
    if rest in schema or ("unevaluatedItems" in schema and own != "unevaluatedItems"):
        kinds.append(ANY)
    if "contains" in schema and reader.document.contains_looks:
        kinds.append(reader.child(schema["contains"], "contains"))
    return Seen(some(*keys), len(first), some(*kinds))
