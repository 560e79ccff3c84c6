"""What a JSON Schema says, as sets of JSON values.

A *kind* is a set of values of one JSON type, described by limits that all hold. An *expression* combines kinds: all of,
some of, exactly one of, not. Subschemas are named by place, so a schema that refers to itself is a small graph. All are
frozen values; they know nothing of grammars or of the words of JSON Schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias


@dataclass(frozen=True)
class Null:
    """null."""


@dataclass(frozen=True)
class Truth:
    """true, or false."""

    value: bool


@dataclass(frozen=True)
class Number:
    """Numbers within limits that are multiples of `multiple` and of none of `off`. Integers are multiples of 1."""

    low: Fraction | None = None
    low_open: bool = False
    high: Fraction | None = None
    high_open: bool = False
    multiple: Fraction | None = None
    off: frozenset[Fraction] = frozenset()


@dataclass(frozen=True)
class Text:
    """Strings: a finite set, or all within limits. Lengths are in code points."""

    values: frozenset[str] | None = None
    shortest: int = 0
    longest: int | None = None
    patterns: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    unmatched: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Count:
    """How many items from index `start` on are in `item`."""

    item: Shape
    start: int = 0
    low: int = 1
    high: int | None = None


@dataclass(frozen=True)
class Array:
    """Arrays: the first items, the rest, how many, and what they contain."""

    first: tuple[Shape, ...] = ()
    rest: Shape | None = None
    low: int = 0
    high: int | None = None
    unique: bool = False
    counts: tuple[Count, ...] = ()


@dataclass(frozen=True)
class Rule:
    """Every property whose name is in `keys` has a value in `value`."""

    keys: Shape
    value: Shape


@dataclass(frozen=True)
class Has:
    """Some property whose name is in `keys` has a value in `value`."""

    keys: Shape
    value: Shape


@dataclass(frozen=True)
class Object:
    """Objects: what holds of every property, which properties there are, how many."""

    rules: tuple[Rule, ...] = ()
    has: tuple[Has, ...] = ()
    low: int = 0
    high: int | None = None


Kind: TypeAlias = Null | Truth | Number | Text | Array | Object


@dataclass(frozen=True)
class Only:
    """The values of one kind."""

    kind: Kind


@dataclass(frozen=True)
class Value:
    """One value, by its canonical text."""

    text: str


@dataclass(frozen=True)
class Place:
    """What the subschema of this number in the document says."""

    number: int


@dataclass(frozen=True)
class All:
    parts: tuple[Shape, ...]


@dataclass(frozen=True)
class Some:
    parts: tuple[Shape, ...]


@dataclass(frozen=True)
class One:
    """Values in exactly one of the parts."""

    parts: tuple[Shape, ...]


@dataclass(frozen=True)
class Not:
    part: Shape


Shape: TypeAlias = Only | Value | Place | All | Some | One | Not

ANY = All(())
NEVER = Some(())
EVERY_KIND: tuple[Kind, ...] = (Null(), Truth(True), Truth(False), Number(), Text(), Array(), Object())


def every(*parts: Shape) -> Shape:
    """Return the values in all parts, with what says nothing left out."""
    flat = dict.fromkeys(inner for part in parts for inner in (part.parts if isinstance(part, All) else (part,)))
    if NEVER in flat:
        return NEVER
    return next(iter(flat)) if len(flat) == 1 else All(tuple(flat))


def some(*parts: Shape) -> Shape:
    """Return the values in any part."""
    flat = dict.fromkeys(inner for part in parts for inner in (part.parts if isinstance(part, Some) else (part,)))
    if ANY in flat:
        return ANY
    return next(iter(flat)) if len(flat) == 1 else Some(tuple(flat))


def outside(part: Shape) -> Shape:
    """Return the values that are not in a part."""
    if part == ANY:
        return NEVER
    if part == NEVER:
        return ANY
    return part.part if isinstance(part, Not) else Not(part)


def one_name(name: str) -> Shape:
    return Only(Text(values=frozenset({name})))


def having(name: str) -> Shape:
    """Return the objects with a property; the rule that says nothing keeps its place among the others."""
    return Only(Object(rules=(Rule(one_name(name), ANY),), has=(Has(one_name(name), ANY),)))
