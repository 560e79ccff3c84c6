"""The rules of an object: named properties in order, then others, with commas between and counts where they matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ferry.guided import texts
from ferry.guided.algebra import Algebra
from ferry.guided.plans import ObjectPlan, OpenProperties
from ferry.guided.shapes import ANY, Shape

NOTE = "properties that the schema does not list are not written; additionalProperties: true asks for them"


class RuleWriter(Protocol):
    """What an object needs of the writer of the whole grammar."""

    algebra: Algebra
    marks: dict[str, str]

    def rule(self, shape: Shape) -> str: ...

    def term(self, text: str) -> str: ...

    def fresh(self, body: str) -> str: ...


def only_listed(algebra: Algebra, plan: ObjectPlan) -> ObjectPlan:
    """Return a plan without names that its schema neither lists nor speaks of, where it lists some and they suffice.

    Models that may go on with names of their own often do so until the limit of tokens.
    """
    spoken_of = tuple(one for one in plan.open if one.value != ANY)
    if not plan.properties or plan.low > len(plan.properties) or len(spoken_of) == len(plan.open):
        return plan
    if NOTE not in algebra.document.notes:
        algebra.document.notes.append(NOTE)
    return replace(plan, open=spoken_of)


class ObjectWriter:
    """The rules of one object: from each property on, and after so many, what may follow."""

    def __init__(self, writer: RuleWriter, plan: ObjectPlan) -> None:
        self.writer = writer
        self.plan = plan
        self.comma = writer.marks[","]
        self.pairs = [self.pair(texts.literal(one.name), one.value) for one in plan.properties]
        self.open = " | ".join(self.open_pair(one) for one in plan.open)
        self.needed = " | ".join(self.open_pair(one) for one in plan.needed)
        # More need not be counted; one is, for the commas.
        self.cap = max(plan.low, plan.high or 0, 1)
        if plan.low > 1 and plan.open and plan.low > sum(one.required for one in plan.properties):
            raise writer.algebra.refuse("minProperties", "names that the schema does not list may come twice")
        if plan.needed and (plan.low or plan.high is not None):
            raise writer.algebra.refuse("minProperties", "it stands beside a property without a name")
        self.made: dict[tuple[int, int], str] = {}

    def pair(self, key: str, value: Shape) -> str:
        return f"{self.writer.term(key)} {self.writer.marks[':']} {self.writer.rule(value)}"

    def open_pair(self, one: OpenProperties) -> str:
        return self.pair(texts.terminal(one.keys), one.value)

    def write(self) -> str:
        # From the end, so that each rule finds those after it.
        for index in range(len(self.pairs), -1, -1):
            for count in range(min(index, self.cap) + 1):
                body = self.body(index, count)
                if body:
                    self.made[index, count] = self.writer.fresh(body)
        return f"{self.writer.marks['{']} {self.made[0, 0]} {self.writer.marks['}']}"

    def body(self, index: int, count: int) -> str:
        """Return what may follow when so many properties were written; nothing if there is no way on."""
        comma = f"{self.comma} " if count else ""
        if index == len(self.pairs):
            return self.tail(count, comma)
        options = []
        taken = self.made.get((index + 1, min(count + 1, self.cap)))
        if taken and (self.plan.high is None or count < self.plan.high):
            options.append(f"{comma}{self.pairs[index]} {taken}")
        left = self.made.get((index + 1, count))
        if left and not self.plan.properties[index].required:
            options.append(left)
        return " | ".join(options)

    def tail(self, count: int, comma: str) -> str:
        if self.needed:
            either = f"({self.open} | {self.needed})" if self.open else f"({self.needed})"
            # It comes last: of two equal names the later one counts, and this one must.
            return f"{comma}({either} {self.comma})* ({self.needed})"
        low, high = self.plan.low, self.plan.high
        options = ['""'] if count >= low else []
        if self.open and (high is None or count < high) and count + 1 >= low:
            more = times(f"({self.comma} ({self.open}))", 0, None if high is None else high - count - 1)
            options.append(f"{comma}({self.open}) {more}")
        return " | ".join(options)


def times(part: str, low: int, high: int | None) -> str:
    """Return a part repeated; a part of no times is nothing."""
    return "" if high == 0 else f"{part}{{{low},{'' if high is None else high}}}"
