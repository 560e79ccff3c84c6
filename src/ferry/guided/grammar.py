"""Expressions as a grammar in the dialect of Lark that llguidance reads.

One rule an expression, named when it is first met. Before writing, a least fixed point finds the expressions that have
a value at all: what has none is left out, so decoding never walks into a dead end. Every value has one spelling, save
for numbers, and objects have one order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from ferry.guided import numbers, texts
from ferry.guided.algebra import Algebra
from ferry.guided.objects import ObjectWriter, only_listed, times
from ferry.guided.plans import (
    ChoicePlan,
    CountedPlan,
    ObjectPlan,
    TuplesPlan,
    counted_plan,
    object_plans,
    unique_plan,
)
from ferry.guided.refusal import Refusal
from ferry.guided.shapes import ANY, Array, Kind, Null, Number, Object, Shape, Text, Truth, Value

MAX_LITERALS = 20_000
MAX_SHAPES = 20_000
EXACT_FLOAT = 2**53
MAX_MULTIPLE = 10_000


@dataclass(frozen=True)
class ArrayPlan:
    """An array whose items are not counted: the first, the rest, how many."""

    first: tuple[Shape, ...]
    rest: Shape
    low: int
    high: int | None


Plan = ObjectPlan | ArrayPlan | CountedPlan | ChoicePlan | TuplesPlan | Null | Truth | Number | Text


def rules(
    algebra: Algebra, start: Shape, prefix: str = "", whitespace: str | None = None, *, unlisted: bool = True
) -> tuple[str, str]:
    """Return the name of the rule of an expression, and the lines of all rules; names begin with the prefix.

    `whitespace` is a pattern of what may stand around commas and colons and inside brackets; without it nothing may.
    Without `unlisted`, objects that list properties get no others that the schema says nothing about.
    """
    return _Writer(algebra, prefix, whitespace, unlisted).rules(start)


class _Writer:
    def __init__(self, algebra: Algebra, prefix: str, whitespace: str | None, unlisted: bool) -> None:
        self.algebra = algebra
        self.unlisted = unlisted
        self.prefix = prefix
        self.plans: dict[Shape, list[Plan]] = {}
        self.holding: set[Shape] = set()
        self.names: dict[Shape, str] = {}
        self.terminals: dict[str, str] = {}
        self.lines: list[str] = []
        self.todo: list[Shape] = []
        self.marks = {mark: self.mark(mark, whitespace) for mark in "{}[],:"}

    def mark(self, mark: str, whitespace: str | None) -> str:
        if not whitespace:
            return f'"{mark}"'
        blank = f"(?:{whitespace})?"
        before, after = ("" if mark in "{[" else blank), ("" if mark in "}]" else blank)
        return self.term(f"/{before}\\{mark}{after}/")

    def rules(self, start: Shape) -> tuple[str, str]:
        self.find_plans(start)
        self.find_holding()
        if start not in self.holding:
            repair = "look for limits that exclude each other"
            raise Refusal("no JSON value satisfies this schema", code="guided.unsatisfiable", repair=repair)
        root = self.rule(start)
        while self.todo:
            shape = self.todo.pop()
            with self.algebra.standing(shape):
                options = [option for plan in self.plans[shape] for option in self.options(plan)]
            self.lines.append(f"{self.names[shape]}: " + " | ".join(dict.fromkeys(options)))
        terminals = [f"{name}: {text}" for text, name in self.terminals.items()]
        return root, "\n".join([*self.lines, *terminals, ""])

    # Which expressions have values.

    def find_plans(self, start: Shape) -> None:
        todo = [start]
        while todo:
            self.algebra.check_time()
            shape = todo.pop()
            if shape in self.plans:
                continue
            with self.algebra.standing(shape):
                self.plans[shape] = [plan for kind in self.algebra.kinds(shape) for plan in self.plans_of(kind)]
            todo += [part for plan in self.plans[shape] for part in _parts(plan)]
            if len(self.plans) > MAX_SHAPES:
                raise self.algebra.refuse("$ref", f"the schema unfolds into more than {MAX_SHAPES} parts")

    def plans_of(self, kind: Kind) -> list[Plan]:
        if isinstance(kind, Object):
            return list(object_plans(self.algebra, kind))
        if isinstance(kind, Array):
            if kind.unique:
                plan = unique_plan(self.algebra, kind)
                if plan is not None:
                    return [plan]
            if kind.counts:
                return [counted_plan(self.algebra, kind)]
            return [ArrayPlan(kind.first, kind.rest or ANY, kind.low, kind.high)]
        if isinstance(kind, Number) and numbers.is_empty(kind):
            return []
        if isinstance(kind, Text) and texts.is_empty(kind):
            return []
        return [kind]

    def find_holding(self) -> None:
        grown = True
        while grown:
            grown = False
            self.algebra.check_time()
            for shape, plans in reversed(self.plans.items()):
                if shape not in self.holding and any(self.holds(plan) for plan in plans):
                    self.holding.add(shape)
                    grown = True

    def holds(self, plan: Plan) -> bool:
        if isinstance(plan, ArrayPlan):
            most = _length(plan, self.holding)
            return most is None or plan.low <= most
        if isinstance(plan, CountedPlan):
            return plan.start in _live(plan, self.holding)
        if isinstance(plan, ChoicePlan):
            return plan.low <= plan.high
        if isinstance(plan, TuplesPlan):
            return bool(plan.tuples)
        if isinstance(plan, ObjectPlan):
            return self.reduced(plan) is not None
        return True

    def reduced(self, plan: ObjectPlan) -> ObjectPlan | None:
        """Return a plan of objects without properties that cannot be, or nothing if one of those is required."""
        if any(one.required and one.value not in self.holding for one in plan.properties):
            return None
        properties = tuple(one for one in plan.properties if one.value in self.holding)
        open_sets, needed = (
            tuple(one for one in sets if one.value in self.holding and not texts.is_empty(one.keys))
            for sets in (plan.open, plan.needed)
        )
        required = sum(one.required for one in properties) + bool(plan.needed)
        most = None if open_sets else len(properties)
        if (plan.needed and not needed) or (plan.high is not None and required > plan.high):
            return None
        if (most is not None and plan.low > most) or (plan.high is not None and plan.low > plan.high):
            return None
        high = None if plan.high is None or (most is not None and plan.high >= most) else plan.high
        return ObjectPlan(properties, open_sets, needed, 0 if plan.low <= required else plan.low, high)

    # Rules.

    def rule(self, shape: Shape) -> str:
        if shape not in self.names:
            self.names[shape] = f"{self.prefix}v{len(self.names)}"
            self.todo.append(shape)
        return self.names[shape]

    def new_name(self) -> str:
        return f"{self.prefix}s{len(self.lines)}"

    def fresh(self, body: str) -> str:
        name = self.new_name()
        self.lines.append(f"{name}: {body}")
        return name

    def term(self, text: str) -> str:
        if text not in self.terminals:
            self.terminals[text] = f"{self.prefix.upper()}T{len(self.terminals)}"
        return self.terminals[text]

    def options(self, plan: Plan) -> Iterator[str]:
        if not self.holds(plan):
            return
        if isinstance(plan, Null):
            yield '"null"'
        elif isinstance(plan, Truth):
            yield '"true"' if plan.value else '"false"'
        elif isinstance(plan, Number):
            yield self.number(plan)
        elif isinstance(plan, Text):
            yield self.text(plan)
        elif isinstance(plan, ObjectPlan):
            reduced = self.reduced(plan)
            assert reduced is not None
            yield self.object(reduced)
        elif isinstance(plan, ArrayPlan):
            yield from self.array(plan)
        elif isinstance(plan, CountedPlan):
            yield self.counted(plan)
        elif isinstance(plan, ChoicePlan):
            yield self.choice(plan)
        else:
            for one in plan.tuples:
                items = f" {self.marks[',']} ".join(self.fixed(text) for text in one)
                yield self.bracketed(items)

    def fixed(self, text: str) -> str:
        """Return the rule of one value, which need not be among the parts of the schema."""
        shape = Value(text)
        if shape not in self.plans:
            self.find_plans(shape)
            self.find_holding()
        return self.rule(shape)

    def text(self, limits: Text) -> str:
        if limits.values is None:
            return self.term(texts.terminal(limits))
        if len(limits.values) > MAX_LITERALS:
            raise self.algebra.refuse("enum", f"more than {MAX_LITERALS} strings")
        return self.term(" | ".join(texts.literal(value) for value in sorted(limits.values)))

    def number(self, number: Number) -> str:
        listed = numbers.finite(number, 200)
        if listed is not None:
            return self.term(" | ".join(json.dumps(numbers.decimal(value)) for value in listed))
        if number.off - {1} or (number.off and number.multiple is not None):
            raise self.algebra.refuse("multipleOf", "numbers that are not a multiple are not in the grammar")
        if number.multiple is None or numbers.power_of_ten(number.multiple) is not None:
            return self.term(numbers.terminal(number))
        if numbers.coefficient(number.multiple) > MAX_MULTIPLE:
            raise self.algebra.refuse(
                "multipleOf", f"{numbers.decimal(number.multiple)} has too many digits to count with"
            )
        return "%json " + json.dumps(self.multiples(number))

    def multiples(self, number: Number) -> dict[str, object]:
        """Return multiples as a schema of llguidance, which counts them in its automaton, within its precision."""
        assert number.multiple is not None
        whole = number.multiple.denominator == 1
        schema: dict[str, object] = {
            "type": "integer" if whole else "number",
            "x-guidance": {"whitespace_flexible": False},
        }
        bounds = (
            ("exclusiveMinimum" if number.low_open else "minimum", number.low),
            ("exclusiveMaximum" if number.high_open else "maximum", number.high),
            ("multipleOf", number.multiple),
        )
        for word, value in bounds:
            if value is not None:
                if max(abs(value.numerator), value.denominator) > EXACT_FLOAT:
                    raise self.algebra.refuse(word, f"{numbers.decimal(value)} has too many digits beside 'multipleOf'")
                schema[word] = int(value) if value.denominator == 1 else float(value)
        return schema

    def bracketed(self, items: str) -> str:
        return f"{self.marks['[']} {items} {self.marks[']']}"

    def array(self, plan: ArrayPlan) -> Iterator[str]:
        comma = self.marks[","]
        low, high = plan.low, _length(plan, self.holding)
        first = [self.rule(shape) for shape in plan.first[:high]]
        low_tail = max(low - len(first), 0)
        tail = ""
        if (high is None or high > len(first)) and plan.rest in self.holding:
            rest = self.rule(plan.rest)
            most = None if high is None else high - len(first)
            if first:
                tail = times(f"({comma} {rest})", low_tail, most)
            else:
                more = times(f"({comma} {rest})", max(low_tail - 1, 0), None if most is None else most - 1)
                yield self.bracketed(f"{rest} {more}")
                if low == 0:
                    yield self.bracketed("")
                return
        for index in range(len(first), 0, -1):
            body = first[index - 1] if index == 1 else f"{comma} {first[index - 1]}"
            tail = f"{body} {tail}".strip()
            if index - 1 >= low:
                tail = f"({tail})?"
        yield self.bracketed(tail)

    def counted(self, plan: CountedPlan) -> str:
        live = _live(plan, self.holding)
        name = self.new_name()
        names = {state: f"{name}_{index}" for index, state in enumerate(sorted(live))}
        options: dict[tuple[int, ...], list[str]] = {state: [] for state in live}
        for step in plan.steps:
            if step.state in live and step.after in live and step.item in self.holding:
                options[step.state].append(f"{self.rule(step.item)} {names[step.after]}")
        for state in sorted(live):
            ends = ['""'] if state in plan.ends else []
            more = [f"{self.marks[',']} {option}" for option in options[state]]
            self.lines.append(f"{names[state]}: " + " | ".join([*more, *ends]))
        first = self.fresh(" | ".join([*options[plan.start], *(['""'] if plan.start in plan.ends else [])]))
        return self.bracketed(first)

    def choice(self, plan: ChoicePlan) -> str:
        """Write a list of different items: each value sets a bit of the parameter of the rule."""
        if plan.high == 0:
            return self.bracketed("")
        first, rest = f"{self.new_name()}a", f"{self.new_name()}b"
        options = [
            (self.fixed(value), f"%if and(bit_clear({bit}), bit_count_lt(_, {plan.high}))", f"{rest}::set_bit({bit})")
            for bit, value in enumerate(plan.values)
        ]
        heads = [f"{value} {after} {test}" for value, test, after in options]
        tails = [f"{self.marks[',']} {value} {after} {test}" for value, test, after in options]
        empty = ['""'] if plan.low == 0 else []
        self.lines.append(f"{first}::_: " + " | ".join([*heads, *empty]))
        self.lines.append(f"{rest}::_: " + " | ".join([*tails, f'"" %if bit_count_ge(_, {plan.low})']))
        return self.bracketed(f"{first}::0")

    def object(self, plan: ObjectPlan) -> str:
        # Every subschema has been read by now: one of them may have asked for them.
        unlisted = self.unlisted or self.algebra.document.asks_for_unlisted
        return ObjectWriter(self, plan if unlisted else only_listed(self.algebra, plan)).write()


def _parts(plan: Plan) -> Iterator[Shape]:
    if isinstance(plan, ObjectPlan):
        yield from (one.value for one in plan.properties)
        yield from (one.value for one in (*plan.open, *plan.needed))
    elif isinstance(plan, ArrayPlan):
        yield from plan.first
        if plan.high is None or plan.high > len(plan.first):
            yield plan.rest
    elif isinstance(plan, CountedPlan):
        yield from (step.item for step in plan.steps)


def _length(plan: ArrayPlan, holding: set[Shape]) -> int | None:
    """Return the greatest length of an array, as far as its items have values; nothing if it has no end."""
    longest = next((i for i, shape in enumerate(plan.first) if shape not in holding), len(plan.first))
    if longest == len(plan.first) and plan.rest in holding:
        return plan.high
    return longest if plan.high is None else min(plan.high, longest)


def _live(plan: CountedPlan, holding: set[Shape]) -> set[tuple[int, ...]]:
    """Return the states from which an end can be reached."""
    live = set(plan.ends)
    grown = True
    while grown:
        more = {step.state for step in plan.steps if step.after in live and step.item in holding} - live
        grown = bool(more)
        live |= more
    return live
