"""What the log of an engine's process means, as data: `engine_log.csv`.

A line of the table is a pattern of what a program writes, and what it means: a `failure` with its cause and remedy, or
`progress` of the start. `{1}` in a text stands for the first group of the pattern. The rows are tried in order.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from functools import cache
from importlib.resources import files
from typing import NamedTuple

KEPT_LINES = 400
SHOWN_LINES = 6
PROCESS = r"(?:\(\w+ pid=\d+\)\s*)?"
STAMP = r"(?:(?:INFO|WARNING|ERROR|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]\s*)?"
NOISE = re.compile(rf"^\s*{PROCESS}{STAMP}")
"""What programs put before what they say."""


class Meaning(NamedTuple):
    """What a line of a log says, in words for people."""

    kind: str
    """failure or progress."""
    text: str
    repair: str = ""


class _Row(NamedTuple):
    engine: str
    kind: str
    pattern: re.Pattern[str]
    text: str
    repair: str

    def meaning(self, found: re.Match[str]) -> Meaning:
        return Meaning(self.kind, _filled(self.text, found), _filled(self.repair, found))


class Log:
    """The last lines of a process, and what they mean for one engine."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)

    def add(self, line: str) -> Meaning | None:
        """Keep a line; return what it means, if that is known."""
        self._lines.append(line)
        return meaning(self._engine, line)

    def failure(self) -> Meaning | None:
        """Return the known failure that the kept lines show: the one that stands first in the table."""
        for row in _rows():
            if row.kind == "failure" and self._engine.startswith(row.engine):
                for line in self._lines:
                    found = row.pattern.search(line)
                    if found:
                        return row.meaning(found)
        return None

    def tail(self, number: int = SHOWN_LINES) -> str:
        """Return the last lines that say something, in one line."""
        lines = [NOISE.sub("", line).strip() for line in self._lines]
        return " | ".join([line for line in lines if line][-number:])


def meaning(engine: str, line: str) -> Meaning | None:
    """Return what a line means for an engine; None where the table has nothing."""
    for row in _rows():
        found = row.pattern.search(line) if engine.startswith(row.engine) else None
        if found:
            return row.meaning(found)
    return None


def _filled(text: str, found: re.Match[str]) -> str:
    for number, group in enumerate(found.groups(), 1):
        text = text.replace(f"{{{number}}}", group or "?")
    return text


@cache
def _rows() -> tuple[_Row, ...]:
    text = files("ferry.engines").joinpath("engine_log.csv").read_text(encoding="utf-8")
    return tuple(
        _Row(row["engine"], row["kind"], re.compile(row["pattern"]), row["text"], row["repair"])
        for row in csv.DictReader(text.splitlines())
    )
