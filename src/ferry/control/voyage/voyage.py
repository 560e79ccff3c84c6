"""A voyage as data: what the file says, checked, with nothing of it done yet."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.control.voyage.expression import Tree

BUILT_IN_NAMES = ("output", "here", "python", "name", "steps", "variables")


@dataclass(frozen=True)
class Gate:
    """A condition on results, judged as soon as the step `after` is done."""

    text: str
    tree: Tree
    after: str


@dataclass(frozen=True)
class Step:
    """One verb with its fields, or one command; values may still hold references. `line` is its place in the file."""

    name: str
    verb: str
    fields: dict[str, Any]
    command: tuple[str, ...]
    env: dict[str, str]
    line: int

    @property
    def kind(self) -> str:
        """Return the verb, or the word `command`."""
        return self.verb or "command"


@dataclass(frozen=True)
class Voyage:
    """Everything a voyage file says. `output` and `file` are absolute."""

    file: Path
    name: str
    title: str
    output: Path
    variables: dict[str, Any]
    steps: tuple[Step, ...]
    gates: tuple[Gate, ...]

    def names(self) -> dict[str, Any]:
        """Return what references may name, before any step has a result."""
        return own_names(self.file, self.name, self.output, self.variables)


def own_names(file: Path, name: str, output: Path, variables: dict[str, Any]) -> dict[str, Any]:
    built_in = {"output": str(output), "here": str(file.parent), "python": sys.executable, "name": name}
    return {**variables, **built_in, "variables": variables, "steps": {}}
