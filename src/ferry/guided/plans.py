"""How a kind of arrays or objects is written from left to right.

An object has its named properties first, in the order of the schema, then those that the schema does not name. An array
is a walk over states when its items are counted. Plans hold expressions still; `grammar.py` asks which have values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ferry.guided import numbers
from ferry.guided.algebra import Algebra, single_name
from ferry.guided.shapes import (
    ANY,
    NEVER,
    Array,
    Has,
    Null,
    Number,
    Object,
    Only,
    Rule,
    Shape,
    Text,
    Truth,
    every,
    outside,
)
from ferry.guided.values import canonical

MAX_OPEN_RULES = 6
MAX_STATES = 4000
MAX_VALUES = 60
MAX_CHOICES = 64
MAX_TUPLES = 300


@dataclass(frozen=True)
class Property:
    name: str
    value: Shape
    required: bool


@dataclass(frozen=True)
class OpenProperties:
    """Properties that the schema does not name: sets of names, and what their values are."""

    keys: Text
    value: Shape


@dataclass(frozen=True)
class ObjectPlan:
    properties: tuple[Property, ...]
    open: tuple[OpenProperties, ...]
    needed: tuple[OpenProperties, ...]  # one property of these at least, if there are any
    low: int
    high: int | None


@dataclass(frozen=True)
class Step:
    """From one state of a counted array, an item leads to another state."""

    state: tuple[int, ...]
    item: Shape
    after: tuple[int, ...]


@dataclass(frozen=True)
class CountedPlan:
    start: tuple[int, ...]
    steps: tuple[Step, ...]
    ends: frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class ChoicePlan:
    """Arrays of different items, each out of a list of values."""

    values: tuple[str, ...]
    low: int
    high: int


@dataclass(frozen=True)
class TuplesPlan:
    """Arrays that are listed one by one."""

    tuples: tuple[tuple[str, ...], ...]


def object_plans(algebra: Algebra, kind: Object) -> list[ObjectPlan]:
    """Return the plans of which a kind of objects is the union."""
    names = _names(algebra, kind)
    single: list[Has] = []
    several: list[Has] = []
    for need in kind.has:
        (single if single_name(need.keys) is not None else several).append(need)
    choices = [_choices(algebra, need, names) for need in several]
    found: list[ObjectPlan] = []
    for picks in itertools.islice(itertools.product(*choices), MAX_CHOICES + 1):
        if len(found) == MAX_CHOICES:
            raise algebra.refuse("not", f"more than {MAX_CHOICES} ways to choose a property")
        named = [pick for pick in picks if single_name(pick.keys) is not None]
        unnamed = [pick for pick in picks if single_name(pick.keys) is None]
        if len(unnamed) > 1:
            raise algebra.refuse("not", "two properties without a name are needed")
        all_names = list(dict.fromkeys([*names, *(str(single_name(pick.keys)) for pick in named)]))
        plan = _object_plan(algebra, kind, all_names, [*single, *named], unnamed)
        if plan.needed or not unnamed:
            found.append(plan)
    return found


def _names(algebra: Algebra, kind: Object) -> list[str]:
    """Return the names that a kind of objects says something about, in order."""
    found: dict[str, None] = {}
    for keys in [*(rule.keys for rule in kind.rules), *(need.keys for need in kind.has)]:
        for part in algebra.kinds(keys):
            if isinstance(part, Text) and part.values is not None:
                found.update(dict.fromkeys(sorted(part.values)))
    for rule in kind.rules:
        for part in algebra.kinds(rule.keys):
            if isinstance(part, Text) and part.values is None:
                found.update(dict.fromkeys(name for name in sorted(part.excluded) if name not in found))
    return list(found)


def _choices(algebra: Algebra, need: Has, names: list[str]) -> list[Has]:
    """Return each property by which a need for one of several can be met."""
    found = [
        Has(Only(Text(values=frozenset({name}))), need.value) for name in names if algebra.accepts_text(need.keys, name)
    ]
    unnamed = every(need.keys, Only(Text(excluded=frozenset(names))))
    if any(isinstance(kind, Text) for kind in algebra.kinds(unnamed)):
        found.append(Has(unnamed, need.value))
    return found


def _object_plan(algebra: Algebra, kind: Object, names: list[str], named: list[Has], unnamed: list[Has]) -> ObjectPlan:
    properties = []
    for name in names:
        needs = [need.value for need in named if single_name(need.keys) == name]
        rules = [rule.value for rule in kind.rules if algebra.accepts_text(rule.keys, name)]
        properties.append(Property(name, every(*rules, *needs), bool(needs)))
    open_sets = list(_open(algebra, kind.rules, names))
    needed = [
        OpenProperties(part, every(one.value, need.value))
        for need in unnamed
        for one in open_sets
        for part in algebra.kinds(every(Only(one.keys), need.keys))
        if isinstance(part, Text)
    ]
    return ObjectPlan(tuple(properties), tuple(open_sets), tuple(needed) if unnamed else (), kind.low, kind.high)


def _open(algebra: Algebra, rules: tuple[Rule, ...], names: list[str]) -> Iterator[OpenProperties]:
    """Yield the sets of names that the schema does not name, parted by which rules hold for them."""
    wide = [
        rule
        for rule in rules
        if any(isinstance(part, Text) and part.values is None for part in algebra.kinds(rule.keys))
    ]
    if len(wide) > MAX_OPEN_RULES:
        raise algebra.refuse("patternProperties", f"more than {MAX_OPEN_RULES} patterns of one object")
    rest = Only(Text(excluded=frozenset(names)))
    for chosen in itertools.product((True, False), repeat=len(wide)):
        value = every(*(rule.value for rule, taken in zip(wide, chosen, strict=True) if taken))
        if value == NEVER:
            continue
        keys = [rule.keys if taken else outside(rule.keys) for rule, taken in zip(wide, chosen, strict=True)]
        for part in algebra.kinds(every(*keys, rest)):
            if isinstance(part, Text):
                yield OpenProperties(part, value)


def counted_plan(algebra: Algebra, kind: Array) -> CountedPlan:
    """Return the walk of an array whose items are counted: an index and one count for each."""
    high = kind.high
    horizon = max(len(kind.first), kind.low, high or 0, *(count.start for count in kind.counts))
    tops = [count.low if count.high is None else max(count.low, count.high) for count in kind.counts]
    start = (0, *(0 for _ in tops))
    steps: list[Step] = []
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        index = state[0]
        if high is not None and index >= high:
            continue
        base = kind.first[index] if index < len(kind.first) else kind.rest or ANY
        for item, counts in _taken(kind, base, state, tops):
            after = (min(index + 1, horizon), *counts)
            steps.append(Step(state, item, after))
            if after not in seen:
                seen.add(after)
                todo.append(after)
        if len(seen) > MAX_STATES:
            raise algebra.refuse("contains", f"more than {MAX_STATES} states of counting")
    ends = frozenset(state for state in seen if _is_end(kind, state))
    return CountedPlan(start, tuple(steps), ends)


def _taken(
    kind: Array, base: Shape, state: tuple[int, ...], tops: list[int]
) -> Iterator[tuple[Shape, tuple[int, ...]]]:
    """Yield each way in which the next item may be counted or not."""
    ways: list[list[tuple[Shape, int]]] = []
    for count, top, reached in zip(kind.counts, tops, state[1:], strict=True):
        if state[0] < count.start:
            ways.append([(ANY, reached)])
        elif count.high is None:
            # Which items are counted may stay open, so nothing need be negated.
            ways.append([(ANY, reached), *([(count.item, reached + 1)] if reached < top else [])])
        else:
            more = [(count.item, reached + 1)] if reached < count.high else []
            ways.append([*more, (outside(count.item), reached)])
    for picks in itertools.product(*ways):
        yield every(base, *(shape for shape, _ in picks)), tuple(reached for _, reached in picks)


def _is_end(kind: Array, state: tuple[int, ...]) -> bool:
    enough = all(reached >= count.low for count, reached in zip(kind.counts, state[1:], strict=True))
    return enough and state[0] >= kind.low


def unique_plan(algebra: Algebra, kind: Array) -> ChoicePlan | TuplesPlan | None:
    """Return the plan of an array without equal items; nothing if its length alone makes it so."""
    if kind.high is not None and kind.high <= 1:
        return None
    if kind.counts:
        raise algebra.refuse("uniqueItems", "it stands beside 'contains'")
    rest = values_of(algebra, kind.rest or ANY, MAX_VALUES)
    longest = len(kind.first) if kind.high is None and rest == [] else kind.high
    if longest is not None and longest <= len(kind.first):
        lists = [values_of(algebra, item, MAX_VALUES) for item in kind.first[:longest]]
        if all(values is not None for values in lists):
            return _tuples(algebra, [values or [] for values in lists], kind.low)
    if kind.first or rest is None:
        raise algebra.refuse("uniqueItems", "the items are not out of a short list of values")
    return ChoicePlan(tuple(rest), kind.low, len(rest) if kind.high is None else min(kind.high, len(rest)))


def _tuples(algebra: Algebra, lists: list[list[str]], low: int) -> TuplesPlan:
    found: list[tuple[str, ...]] = []
    for length in range(low, len(lists) + 1):
        for one in itertools.product(*lists[:length]):
            if len(set(one)) == length:
                found.append(one)
            if len(found) > MAX_TUPLES:
                raise algebra.refuse("uniqueItems", f"more than {MAX_TUPLES} arrays of different items")
    return TuplesPlan(tuple(found))


def values_of(algebra: Algebra, shape: Shape, limit: int) -> list[str] | None:
    """Return all values in an expression as canonical texts, or nothing if they are many."""
    found: dict[str, None] = {}
    for kind in algebra.kinds(shape):
        values: list[str] | None = None
        if isinstance(kind, Null):
            values = ["null"]
        elif isinstance(kind, Truth):
            values = ["true" if kind.value else "false"]
        elif isinstance(kind, Number):
            fractions = numbers.finite(kind, limit)
            values = None if fractions is None else [numbers.decimal(one) for one in fractions]
        elif isinstance(kind, Text) and kind.values is not None:
            values = [canonical(one) for one in sorted(kind.values)]
        elif isinstance(kind, Array):
            values = _values_of_array(algebra, kind, limit)
        elif isinstance(kind, Object):
            values = _values_of_object(algebra, kind, limit)
        if values is None:
            return None
        found.update(dict.fromkeys(values))
        if len(found) > limit:
            return None
    return list(found)


def _values_of_array(algebra: Algebra, kind: Array, limit: int) -> list[str] | None:
    if kind.counts or kind.unique or kind.high is None or kind.high > min(limit, 8):
        return None
    return _products(
        algebra,
        [
            [kind.first[index] if index < len(kind.first) else kind.rest or ANY for index in range(length)]
            for length in range(kind.low, kind.high + 1)
        ],
        lambda texts: "[" + ",".join(texts) + "]",
        limit,
    )


def _values_of_object(algebra: Algebra, kind: Object, limit: int) -> list[str] | None:
    plans = object_plans(algebra, kind)
    if len(plans) != 1 or plans[0].open or len(plans[0].properties) > 8 or kind.low or kind.high is not None:
        return None
    properties = sorted(plans[0].properties, key=lambda one: one.name)
    sets = []
    for chosen in itertools.product((True, False), repeat=len(properties)):
        if all(taken or not one.required for one, taken in zip(properties, chosen, strict=True)):
            sets.append([one for one, taken in zip(properties, chosen, strict=True) if taken])
    found: list[str] = []
    for members in sets:
        head = [canonical(one.name) for one in members]
        texts = _products(
            algebra,
            [[one.value for one in members]],
            lambda values, head=head: "{" + ",".join(map(":".join, zip(head, values, strict=True))) + "}",  # type: ignore[misc]
            limit,
        )
        if texts is None or len(found) + len(texts) > limit:
            return None
        found += texts
    return found


def _products(
    algebra: Algebra, rows: list[list[Shape]], join: Callable[[tuple[str, ...]], str], limit: int
) -> list[str] | None:
    found: list[str] = []
    for row in rows:
        lists = [values_of(algebra, shape, limit) for shape in row]
        if any(values is None for values in lists):
            return None
        for texts in itertools.product(*(values or [] for values in lists)):
            found.append(join(texts))
            if len(found) > limit:
                return None
    return found
