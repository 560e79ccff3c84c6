"""Expressions worked out: which kinds of values an expression holds, as a list with nothing else in it.

`kinds` brings any expression to a union of kinds, by meeting kinds and by turning a negation inwards. What is inside
arrays and objects stays an expression, so a recursive schema costs no more than its places. The result is exact: a
negation that has no such form is refused with the place where it stands.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ferry.guided import numbers, texts
from ferry.guided.reading import Document
from ferry.guided.refusal import cannot_enforce
from ferry.guided.shapes import (
    ANY,
    EVERY_KIND,
    NEVER,
    All,
    Array,
    Count,
    Has,
    Kind,
    Null,
    Number,
    Object,
    One,
    Only,
    Place,
    Rule,
    Shape,
    Some,
    Text,
    Truth,
    Value,
    every,
    one_name,
    outside,
    some,
)
from ferry.guided.values import canonical, exact, least_common_multiple

MAX_KINDS = 400
DEPTH_OF_LOOK = 5


class Algebra:
    """One document with everything that was worked out about it."""

    def __init__(self, document: Document, check_time: Callable[[], None] = lambda: None) -> None:
        self.document = document
        self.check_time = check_time
        self._kinds: dict[Shape, tuple[Kind, ...]] = {}
        self._open: set[Shape] = set()
        self._read: dict[int, Shape] = {}
        self._where: list[int] = []

    @property
    def pointer(self) -> str:
        return self.document.pointers[self._where[-1]] if self._where else "#"

    def refuse(self, keyword: str, message: str) -> Exception:
        return cannot_enforce(keyword, self.pointer, message)

    @contextmanager
    def standing(self, shape: Shape) -> Iterator[None]:
        """Let refusals name the first place in an expression."""
        parts = shape.parts if isinstance(shape, (All, Some, One)) else (shape,)
        place = next((part.number for part in parts if isinstance(part, Place)), None)
        self._where += [] if place is None else [place]
        try:
            yield
        finally:
            self._where = self._where[: len(self._where) - (place is not None)]

    def kinds(self, shape: Shape) -> tuple[Kind, ...]:
        """Return the kinds of which an expression is the union."""
        known = self._kinds.get(shape)
        if known is not None:
            return known
        self.check_time()
        if shape in self._open:
            raise self.refuse("$ref", "the reference leads back to itself before any array or object")
        self._open.add(shape)
        try:
            found = self._absorbed(self._work_out(shape))
        finally:
            self._open.discard(shape)
        if len(found) > MAX_KINDS:
            raise self.refuse("anyOf", f"more than {MAX_KINDS} alternatives of one value")
        self._kinds[shape] = found
        return found

    def accepts_text(self, shape: Shape, text: str) -> bool:
        """Return whether a string is in an expression."""
        return any(isinstance(kind, Text) and texts.fits(text, kind) for kind in self.kinds(shape))

    def may_hold(self, shape: Shape, depth: int = DEPTH_OF_LOOK) -> bool:
        """Return False if no value is in an expression, as far as a look of some depth can tell."""
        return any(self._plausible(kind, depth) for kind in self.kinds(shape))

    def _work_out(self, shape: Shape) -> Iterable[Kind]:
        if isinstance(shape, Only):
            return (shape.kind,)
        if isinstance(shape, Value):
            return (kind_of_value(shape.text),)
        if isinstance(shape, Place):
            with self.standing(shape):
                return self.kinds(self.says(shape))
        if isinstance(shape, Some):
            return [kind for part in shape.parts for kind in self.kinds(part)]
        if isinstance(shape, All):
            return self._meet_all(shape.parts)
        if isinstance(shape, One):
            return self.kinds(self._exclusive(shape.parts))
        return self._negated(shape.part)

    def says(self, place: Place) -> Shape:
        """Return what a place says, read once."""
        if place.number not in self._read:
            self._read[place.number] = self.document.read(place.number)
        return self._read[place.number]

    def _meet_all(self, parts: Iterable[Shape]) -> list[Kind]:
        met: list[Kind] = list(EVERY_KIND)
        for part in parts:
            options = self.kinds(part)
            met = list(dict.fromkeys(kind for one in met for other in options if (kind := self.meet(one, other))))
            if len(met) > MAX_KINDS:
                raise self.refuse("allOf", f"more than {MAX_KINDS} alternatives of one value")
        return met

    def _exclusive(self, parts: tuple[Shape, ...]) -> Shape:
        """Return exactly one of some parts; parts that never meet need no negation."""
        meeting: list[list[Shape]] = [[] for _ in parts]
        for (i, one), (j, other) in itertools.combinations(enumerate(parts), 2):
            if one == other or self.may_hold(every(one, other)):
                meeting[i].append(other)
                meeting[j].append(one)
        return some(*(every(part, *map(outside, others)) for part, others in zip(parts, meeting, strict=True)))

    def _negated(self, shape: Shape) -> Iterable[Kind]:
        if isinstance(shape, Only):
            return self._complement(shape.kind)
        if isinstance(shape, Value):
            return self._complement(kind_of_value(shape.text))
        if isinstance(shape, Place):
            with self.standing(shape):
                return self.kinds(outside(self.says(shape)))
        if isinstance(shape, Some):
            return self._meet_all([outside(part) for part in shape.parts])
        if isinstance(shape, All):
            return [kind for part in shape.parts for kind in self.kinds(outside(part))]
        if isinstance(shape, One):
            pairs = [every(one, other) for one, other in itertools.combinations(shape.parts, 2)]
            return self.kinds(some(every(*map(outside, shape.parts)), *pairs))
        return self.kinds(shape.part)

    def _complement(self, kind: Kind) -> list[Kind]:
        others = [one for one in EVERY_KIND if type(one) is not type(kind)]
        if isinstance(kind, Truth):
            return [*others, Truth(not kind.value)]
        if isinstance(kind, Number):
            return [*others, *_not_number(kind)]
        if isinstance(kind, Text):
            return [*others, *self._not_text(kind)]
        if isinstance(kind, Array):
            return [*others, *self._not_array(kind)]
        if isinstance(kind, Object):
            return [*others, *_not_object(kind)]
        return others

    def _not_text(self, kind: Text) -> list[Kind]:
        if kind.values is not None:
            return [Text(excluded=kind.values)]
        if kind.formats:
            raise self.refuse("format", f"the strings without the format {min(kind.formats)!r} are not known exactly")
        found: list[Kind] = []
        if kind.shortest:
            found.append(Text(longest=kind.shortest - 1))
        if kind.longest is not None:
            found.append(Text(shortest=kind.longest + 1))
        found += [Text(unmatched=frozenset({one})) for one in sorted(kind.patterns)]
        found += [Text(patterns=frozenset({one})) for one in sorted(kind.unmatched)]
        return [*found, Text(values=kind.excluded)] if kind.excluded else found

    def _not_array(self, kind: Array) -> list[Kind]:
        if kind.unique:
            raise self.refuse("uniqueItems", "arrays with two equal items are not in the grammar")
        found: list[Kind] = []
        if kind.low:
            found.append(Array(high=kind.low - 1))
        if kind.high is not None:
            found.append(Array(low=kind.high + 1))
        for index, item in enumerate(kind.first):
            if item != ANY:
                found.append(Array(first=(*[ANY] * index, outside(item)), low=index + 1))
        if kind.rest is not None:
            found.append(Array(counts=(Count(outside(kind.rest), len(kind.first)),)))
        for count in kind.counts:
            if count.low:
                found.append(Array(counts=(replace(count, low=0, high=count.low - 1),)))
            if count.high is not None:
                found.append(Array(counts=(replace(count, low=count.high + 1, high=None),)))
        return found

    def meet(self, one: Kind, other: Kind) -> Kind | None:
        """Return the values in both kinds, or nothing if it is plain that there are none."""
        if isinstance(one, Null) and isinstance(other, Null):
            return one
        if isinstance(one, Truth) and isinstance(other, Truth):
            return one if one == other else None
        if isinstance(one, Number) and isinstance(other, Number):
            return _meet_numbers(one, other)
        if isinstance(one, Text) and isinstance(other, Text):
            return _meet_texts(one, other)
        if isinstance(one, Array) and isinstance(other, Array):
            return _meet_arrays(one, other)
        if isinstance(one, Object) and isinstance(other, Object):
            return self._meet_objects(one, other)
        return None

    def _meet_objects(self, one: Object, other: Object) -> Object | None:
        rules, has = (tuple(dict.fromkeys((*getattr(one, name), *getattr(other, name)))) for name in ("rules", "has"))
        high = _least(one.high, other.high)
        met = Object(rules, has, max(one.low, other.low), high)
        if high is not None and met.low > high:
            return None
        for need in met.has:
            name = single_name(need.keys)
            if name is not None and any(
                rule.value == NEVER and self.accepts_text(rule.keys, name) for rule in met.rules
            ):
                return None
        return met

    def _absorbed(self, kinds: Iterable[Kind]) -> tuple[Kind, ...]:
        """Return kinds without repetition, and without those inside the whole of their type."""
        found = list(dict.fromkeys(kinds))
        whole = {type(kind) for kind in EVERY_KIND if kind in found and not isinstance(kind, Truth)}
        kept = [kind for kind in found if type(kind) not in whole or kind in EVERY_KIND]
        strings = [kind.values for kind in kept if isinstance(kind, Text) and kind.values is not None]
        if len(strings) > 1:
            merged = Text(values=frozenset().union(*strings))
            kept = [kind for kind in kept if not isinstance(kind, Text) or kind.values is None] + [merged]
        return tuple(kept)

    def _plausible(self, kind: Kind, depth: int) -> bool:
        if isinstance(kind, Number):
            return not numbers.is_empty(kind)
        if isinstance(kind, Text):
            return not texts.is_empty(kind)
        if depth <= 0:
            return True
        if isinstance(kind, Array):
            if kind.high is not None and kind.low > kind.high:
                return False
            items = [kind.first[i] if i < len(kind.first) else kind.rest or ANY for i in range(min(kind.low, 64))]
            return all(self.may_hold(item, depth - 1) for item in dict.fromkeys(items))
        if isinstance(kind, Object):
            return all(self._satisfiable(kind, need, depth) for need in kind.has)
        return True

    def _satisfiable(self, kind: Object, need: Has, depth: int) -> bool:
        name = single_name(need.keys)
        if name is None:
            return self.may_hold(need.keys, 0) and self.may_hold(need.value, depth - 1)
        rules = [rule.value for rule in kind.rules if self.accepts_text(rule.keys, name)]
        twins = [other.value for other in kind.has if other.keys == need.keys]
        return self.may_hold(every(*rules, *twins), depth - 1)


def single_name(keys: Shape) -> str | None:
    """Return the only name in a set of names, if it has just one."""
    if isinstance(keys, Only) and isinstance(keys.kind, Text) and keys.kind.values and len(keys.kind.values) == 1:
        return next(iter(keys.kind.values))
    return None


def kind_of_value(text: str) -> Kind:
    """Return the kind that has one value."""
    value: Any = json.loads(text)
    if value is None:
        return Null()
    if isinstance(value, bool):
        return Truth(value)
    if isinstance(value, (int, float)):
        number = exact(value)
        return Number(low=number, high=number)
    if isinstance(value, str):
        return Text(values=frozenset({value}))
    if isinstance(value, list):
        items = tuple(Value(canonical(item)) for item in value)
        return Array(first=items, rest=NEVER, low=len(items), high=len(items))
    rules = [Rule(one_name(name), Value(canonical(inner))) for name, inner in value.items()]
    others = Rule(Only(Text(excluded=frozenset(value))), NEVER)
    return Object((*rules, others), tuple(Has(one_name(name), ANY) for name in value))


def _not_number(kind: Number) -> list[Kind]:
    found: list[Kind] = []
    if kind.low is not None:
        found.append(Number(high=kind.low, high_open=not kind.low_open))
    if kind.high is not None:
        found.append(Number(low=kind.high, low_open=not kind.high_open))
    if kind.multiple is not None:
        found.append(Number(off=frozenset({kind.multiple})))
    return [*found, *(Number(multiple=one) for one in sorted(kind.off))]


def _not_object(kind: Object) -> list[Kind]:
    found: list[Kind] = [Object(has=(Has(rule.keys, outside(rule.value)),)) for rule in kind.rules if rule.value != ANY]
    for need in kind.has:
        found.append(Object(rules=(Rule(need.keys, outside(need.value)),)))
    if kind.low:
        found.append(Object(high=kind.low - 1))
    if kind.high is not None:
        found.append(Object(low=kind.high + 1))
    return found


def _meet_numbers(one: Number, other: Number) -> Number | None:
    low, low_open = _stricter(one.low, one.low_open, other.low, other.low_open, lowest=True)
    high, high_open = _stricter(one.high, one.high_open, other.high, other.high_open, lowest=False)
    multiple = one.multiple or other.multiple
    if one.multiple is not None and other.multiple is not None:
        multiple = least_common_multiple(one.multiple, other.multiple)
    met = Number(low, low_open, high, high_open, multiple, one.off | other.off)
    return None if numbers.is_empty(met) else met


def _stricter(
    one: Fraction | None, one_open: bool, other: Fraction | None, other_open: bool, lowest: bool
) -> tuple[Fraction | None, bool]:
    if one is None or other is None:
        return (other, other_open) if one is None else (one, one_open)
    if one == other:
        return one, one_open or other_open
    return (one, one_open) if (one > other) is lowest else (other, other_open)


def _meet_texts(one: Text, other: Text) -> Text | None:
    if one.values is not None or other.values is not None:
        finite, limits = (one, other) if one.values is not None else (other, one)
        values = frozenset(value for value in finite.values or () if texts.fits(value, limits))
        return Text(values=values) if values else None
    met = Text(
        None,
        max(one.shortest, other.shortest),
        _least(one.longest, other.longest),
        one.patterns | other.patterns,
        one.formats | other.formats,
        one.excluded | other.excluded,
        one.unmatched | other.unmatched,
    )
    return None if met.longest is not None and met.shortest > met.longest else met


def _meet_arrays(one: Array, other: Array) -> Array | None:
    length = max(len(one.first), len(other.first))
    first = tuple(
        every(*(array.first[index] if index < len(array.first) else array.rest or ANY for array in (one, other)))
        for index in range(length)
    )
    rests = [array.rest for array in (one, other) if array.rest is not None]
    rest = every(*rests) if rests else None
    high = _least(one.high, other.high)
    counts = tuple(dict.fromkeys((*one.counts, *other.counts)))
    met = Array(first, rest, max(one.low, other.low), high, one.unique or other.unique, counts)
    return None if high is not None and met.low > high else met


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
