"""Ranges of numbers as terminals: expressions of `&`, `|`, `~` and regular expressions over decimal text.

Numbers within limits are written without an exponent, and with at most 15 digits if they have a fraction.
"""

from __future__ import annotations

import math
from fractions import Fraction

from ferry.guided.shapes import Number

INTEGER = r"-?(?:0|[1-9][0-9]*)"
ANY_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+\-]?[0-9]{1,2})?"
WHOLE_VALUE = r"-?(?:0|[1-9][0-9]*)(?:\.0+)?"
FRACTION = r"(?:\.[0-9]+)?"
# So many digits come through a 64-bit float unharmed: what is below a limit stays below it.
SHORT = r"-?[0-9.]{3,16}"


def decimal(value: Fraction) -> str:
    """Return a number with a finite decimal expansion as decimal text."""
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
        assert places < 2000, value
    digits = str(abs(value.numerator * 10**places // value.denominator)).rjust(places + 1, "0")
    whole, fraction = digits[: len(digits) - places], digits[len(digits) - places :]
    return ("-" if value < 0 else "") + whole + (f".{fraction}" if fraction else "")


def is_empty(number: Number) -> bool:
    """Return whether no number fits."""
    listed = finite(number, 1000)
    if listed is not None:
        return not listed
    if number.multiple is not None and any((number.multiple / off).denominator == 1 for off in number.off):
        return True
    return number.low is not None and number.high is not None and number.low > number.high


def finite(number: Number, limit: int) -> list[Fraction] | None:
    """Return all numbers that fit, in order, or nothing if they are more than a limit."""
    low, high, step = number.low, number.high, number.multiple
    if low is None or high is None:
        return None
    if low == high:
        fits = not (number.low_open or number.high_open) and (step is None or (low / step).denominator == 1)
        values = [low] if fits else []
    elif step is None:
        return [] if low > high else None
    else:
        first = math.floor(low / step) + 1 if number.low_open else math.ceil(low / step)
        last = math.ceil(high / step) - 1 if number.high_open else math.floor(high / step)
        if last - first >= limit:
            return None
        values = [index * step for index in range(first, last + 1)]
    return [value for value in values if not any((value / off).denominator == 1 for off in number.off)]


def terminal(number: Number) -> str:
    """Return the terminal of a range of integers or of numbers; multiples of powers of ten only."""
    bounds = []
    if number.low is not None:
        bounds.append(_over(number.low, strict=number.low_open))
    if number.high is not None:
        bounds.append(_under(number.high, strict=number.high_open))
    power = None if number.multiple is None else power_of_ten(number.multiple)
    if number.multiple is None and not bounds and not number.off:
        base = f"/{ANY_NUMBER}/"
    elif power is not None and power >= 0:
        base = f"/-?(?:0|[1-9][0-9]*0{{{power}}})/" if power else f"/{INTEGER}/"
    else:
        places = FRACTION if power is None else rf"(?:\.[0-9]{{1,{-power}}}0*)?"
        base = f"(/{INTEGER}/ | (/{INTEGER}{places}/ & /{SHORT}/))"
    without = [f"~/{WHOLE_VALUE}/"] if number.off else []
    return " & ".join([base, *bounds, *without])


def power_of_ten(value: Fraction) -> int | None:
    """Return the exponent of a power of ten, or nothing."""
    exponent = len(str(max(value.numerator, value.denominator))) - 1
    exponent = exponent if value >= 1 else -exponent
    return exponent if value == Fraction(10) ** exponent else None


def coefficient(value: Fraction) -> int:
    """Return the digits of a decimal number as an integer, without point and trailing zeros."""
    return int(decimal(value).replace(".", "").strip("0"))


def _over(value: Fraction, strict: bool) -> str:
    """Return the terminal of decimal texts above a value (or equal to it)."""
    if value < 0:
        return f"(/{FRACTION_TEXT}/ | {_negative(-value, above=False, strict=strict)})"
    both_zeros = value == 0 and not strict
    return f"/{_above(value, strict)}{'|-0(?:' + chr(92) + '.0+)?' if both_zeros else ''}/"


def _under(value: Fraction, strict: bool) -> str:
    if value < 0:
        return _negative(-value, above=True, strict=strict)
    over = _above(value, not strict)
    zero = "" if value > 0 or not strict else f" & ~/{ZERO}/"
    return f"(/-{FRACTION_TEXT}/ | (/{FRACTION_TEXT}/ & ~/{over}/)){zero}"


FRACTION_TEXT = r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?"
ZERO = r"-?0(?:\.0+)?"


def _negative(size: Fraction, above: bool, strict: bool) -> str:
    """Return negative numbers whose size is above (or not above) a size; zero is of size 0 with either sign."""
    if above:
        return f"/-(?:{_above(size, strict)})/"
    return f"(/-{FRACTION_TEXT}/ & ~/-(?:{_above(size, not strict)})/)"


def _above(value: Fraction, strict: bool) -> str:
    """Return a regular expression of unsigned decimal texts above a value of 0 or more (or equal to it)."""
    whole, _, fraction = decimal(value).partition(".")
    fraction = fraction.rstrip("0")
    options = [f"[1-9][0-9]{{{0 if whole == '0' else len(whole)},}}{FRACTION}"]
    for index, digit in enumerate(whole if whole != "0" else ""):
        if digit < "9":
            options.append(f"{whole[:index]}{_more(digit)}[0-9]{{{len(whole) - index - 1}}}{FRACTION}")
    for index, digit in enumerate(fraction):
        if digit < "9":
            options.append(f"{whole}\\.{fraction[:index]}{_more(digit)}[0-9]*")
    options.append(f"{whole}\\.{fraction}[0-9]*[1-9][0-9]*")
    if not strict:
        options.append(f"{whole}\\.{fraction}0*" if fraction else f"{whole}(?:\\.0+)?")
    return "(?:" + "|".join(options) + ")"


def _more(digit: str) -> str:
    return "9" if digit == "8" else f"[{int(digit) + 1}-9]"
