"""JSON values: numbers as they are written, and one text for equal values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any


def exact(value: int | float | Decimal) -> Fraction:
    """Return a JSON number as written, without the rounding of binary floats."""
    return Fraction(Decimal(repr(value) if isinstance(value, float) else value))


def least_common_multiple(one: Fraction, other: Fraction) -> Fraction:
    """Return the least common multiple of two positive fractions."""
    scale = math.lcm(one.denominator, other.denominator)
    return Fraction(math.lcm(int(one * scale), int(other * scale)), scale)


def canonical(value: Any) -> str:
    """Return one text for each JSON value: keys sorted, 1.0 as 1."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, (float, Decimal)):
        fraction = exact(value)
        return int(fraction) if fraction.denominator == 1 else float(value)
    return value


def kind_of(value: Any) -> str:
    """Return what a JSON value is, for a message."""
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "a boolean"), (str, "a string"), ((int, float, Decimal), "a number"), (list, "an array"),
        (dict, "an object"), (type(None), "null"),
    ]  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
