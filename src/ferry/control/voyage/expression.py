"""The language of gates: `steps.back.model_sha256 == steps.model.model_sha256 and steps.eval.accuracy >= 0.4`.

It has comparisons (== != < <= > >= in, not in), and / or / not, brackets, numbers, quoted text, true, false, null,
lists and dotted names of results. It has no calls, no arithmetic and no attributes, and is never handed to `eval`: a
voyage file is data. A hyphen belongs to a name. Text and numbers are never equal, and never ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from ferry.core.errors import ConfigError


class Constant(NamedTuple):
    value: Any


class Name(NamedTuple):
    """A dotted name: `steps.model.model_sha256`."""

    text: str


class Items(NamedTuple):
    items: tuple[Tree, ...]


class Comparison(NamedTuple):
    sign: str
    left: Tree
    right: Tree


class Negation(NamedTuple):
    inner: Tree


class Junction(NamedTuple):
    """`and` or `or` between conditions."""

    word: str
    parts: tuple[Tree, ...]


Tree: TypeAlias = "Constant | Name | Items | Comparison | Negation | Junction"


class Judgement(NamedTuple):
    """Whether a gate holds, and the value of every name in it."""

    holds: bool
    values: dict[str, Any]


def names_in(tree: Tree) -> list[str]:
    """Return every dotted name, once, in the order of reading."""
    return list(dict.fromkeys(_names(tree)))


def judge(tree: Tree, look_up: Callable[[str], Any]) -> Judgement:
    """Look up every name first, so that an unknown one is always an error; then decide."""
    values = {name: look_up(name) for name in names_in(tree)}
    return Judgement(_condition(tree, values), values)


def _names(tree: Tree) -> Iterator[str]:
    if isinstance(tree, Name):
        yield tree.text
    elif isinstance(tree, Comparison):
        yield from (*_names(tree.left), *_names(tree.right))
    elif isinstance(tree, Negation):
        yield from _names(tree.inner)
    elif isinstance(tree, Items | Junction):
        for part in tree.items if isinstance(tree, Items) else tree.parts:
            yield from _names(part)


def _condition(tree: Tree, values: dict[str, Any]) -> bool:
    if isinstance(tree, Junction):
        decide = all if tree.word == "and" else any
        return decide(_condition(part, values) for part in tree.parts)
    if isinstance(tree, Negation):
        return not _condition(tree.inner, values)
    value = _value(tree, values)
    if not isinstance(value, bool):
        what = tree.text if isinstance(tree, Name) else "a value"
        raise ConfigError(f"{what} is {value!r}, a condition must be true or false", code="gate.types")
    return value


def _value(tree: Tree, values: dict[str, Any]) -> Any:
    if isinstance(tree, Constant):
        return tree.value
    if isinstance(tree, Name):
        return values[tree.text]
    if isinstance(tree, Items):
        return [_value(item, values) for item in tree.items]
    if isinstance(tree, Comparison):
        return _compare(tree.sign, _value(tree.left, values), _value(tree.right, values))
    return _condition(tree, values)


def _compare(sign: str, left: Any, right: Any) -> bool:
    if sign in ("==", "!="):
        return _equal(left, right) == (sign == "==")
    if sign in ("in", "not in"):
        return _contains(left, right) == (sign == "in")
    if not _ordered(left, right):
        raise ConfigError(f"{left!r} {sign} {right!r}: only two numbers or two texts can be ordered", code="gate.types")
    return bool({"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[sign])


def _equal(left: Any, right: Any) -> bool:
    # Python holds that True == 1; JSON and people do not.
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def _contains(item: Any, whole: Any) -> bool:
    if isinstance(whole, str) and isinstance(item, str):
        return item in whole
    if isinstance(whole, list | dict):
        return any(_equal(item, other) for other in whole)
    raise ConfigError(f"{item!r} in {whole!r}: expected a list, a mapping, or text in text", code="gate.types")


def _ordered(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return False
    return all(isinstance(item, int | float) for item in (left, right)) or all(
        isinstance(item, str) for item in (left, right)
    )
