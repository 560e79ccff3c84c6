"""A YAML file with the line of each of its values, so that an error can say where."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml

from ferry.core.config import Problem, raise_problems
from ferry.core.sources import read_yaml

Place: TypeAlias = "tuple[str | int, ...]"
"""Where a value is: keys and positions from the top of the file."""


class Document(NamedTuple):
    """A file's values, the lines they begin on, and what was found to be wrong with them so far."""

    file: Path
    values: dict[str, Any]
    lines: dict[Place, int]
    problems: list[Problem]

    def line(self, place: Place) -> int:
        """Return the line of a value, or of the nearest thing around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def wrong(self, place: Place, text: str, code: str = "run.file") -> None:
        """Note a problem at a place."""
        self.problems.append(Problem(code, f"{self.file.name}, line {self.line(place)}: {text}"))

    def raise_if_wrong(self) -> None:
        """Raise one ConfigError that names all problems."""
        raise_problems(self.problems)


def read_document(file: Path) -> Document:
    values = read_yaml(file)
    lines: dict[Place, int] = {}
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if root is not None:
        _note(root, (), lines)
    return Document(file, values, lines, [])


def _note(node: yaml.Node, place: Place, lines: dict[Place, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            lines[inner] = key.start_mark.line + 1
            _note(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            inner = (*place, index)
            lines[inner] = item.start_mark.line + 1
            _note(item, inner, lines)
