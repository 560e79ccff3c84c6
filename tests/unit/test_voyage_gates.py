"""Which loss would this catch? A gate that lets a wrong result pass, or that runs code from a file."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.control.voyage.expression import judge, names_in
from ferry.control.voyage.parsing import parse
from ferry.control.voyage.references import find, references_in, substitute
from ferry.core.errors import ConfigError

RESULTS = {
    "steps": {
        "before": {"answer": "Paris", "tokens": 8, "verified": True, "same": None, "files": [1, 2]},
        "after-all": {"answer": "Paris", "tokens": 9, "deep": {"rate": 0.5}},
    }
}
NUMBERS = st.integers(-1000, 1000) | st.floats(-1e6, 1e6).map(lambda number: round(number, 3))
ORDERS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def holds(gate: str, names: dict[str, Any] = RESULTS) -> bool:
    return judge(parse(gate), partial(find, names)).holds


@given(NUMBERS, st.sampled_from(list(ORDERS)), NUMBERS)
def test_numbers_are_compared_as_python_compares_them(left: float, sign: str, right: float) -> None:
    assert holds(f"{left} {sign} {right}") == ORDERS[sign](left, right)
    assert holds(f"x.a {sign} x.b", {"x": {"a": left, "b": right}}) == ORDERS[sign](left, right)


@st.composite
def conditions(draw: st.DrawFn, depth: int = 3) -> tuple[str, bool]:
    """A gate and what Python says about it."""
    if not depth or draw(st.booleans()):
        left, right = draw(NUMBERS), draw(NUMBERS)
        return f"{left} < {right}", left < right
    word = draw(st.sampled_from(["and", "or", "not"]))
    (one, is_one), (two, is_two) = draw(conditions(depth - 1)), draw(conditions(depth - 1))
    if word == "not":
        return f"not ({one})", not is_one
    return f"({one}) {word} ({two})", (is_one and is_two) if word == "and" else (is_one or is_two)


@given(conditions())
def test_and_or_not_bind_as_in_python(condition: tuple[str, bool]) -> None:
    text, expected = condition
    assert holds(text) == expected == bool(eval(text, {}))


@given(st.text(max_size=40))
def test_any_text_is_a_tree_or_a_config_error(text: str) -> None:
    try:
        names_in(parse(text))
    except ConfigError as error:
        code = error.code
    else:
        return
    assert code == "gate.syntax"


@pytest.mark.parametrize(
    "gate",
    [
        "steps.before.answer == steps.after-all.answer",
        "steps.before.verified and not steps.after-all.tokens < 9",
        "steps.before.same == null or false",
        "'ari' in steps.before.answer and 'x' not in steps.before.answer",
        "2 in steps.before.files and steps.before.files.1 == 2",
        "steps.before.tokens in [7, 8] and -1.5e1 < steps.after-all.deep.rate",
        '(true or false) and not false and "a" < "b"',
    ],
)
def test_these_hold(gate: str) -> None:
    assert holds(gate)


@pytest.mark.parametrize("gate", ["1 == true", "0 == false", "1 == '1'", "steps.before.same == false", "true in [1]"])
def test_values_of_different_kinds_are_never_equal(gate: str) -> None:
    assert not holds(gate)


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ("steps.before.answr == 'Paris'", "did you mean 'answer'?"),
        ("true or steps.nobody.x", "steps has no 'nobody'"),
        ("steps.before.answer", "a condition must be true or false"),
        ("not steps.before.same", "a condition must be true or false"),
        ("steps.before.answer < 3", "only two numbers or two texts"),
        ("true < false", "only two numbers or two texts"),
        ("1 in 2", "expected a list"),
    ],
)
def test_what_makes_no_sense_is_an_error_and_not_false(gate: str, reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        holds(gate)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    "gate",
    [
        "",
        "1 <",
        "1 < 2 < 3",
        "(true",
        "[1",
        "true true",
        "__import__('os')",
        "a.b()",
        "1 + 1 == 2",
        "a = b",
        "'a",
        "not",
    ],
)
def test_what_does_not_parse_is_refused(gate: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(gate)
    assert raised.value.code == "gate.syntax"


def test_no_attribute_of_a_python_object_can_be_reached() -> None:
    with pytest.raises(ConfigError):
        holds("steps.before.answer.__class__ == 1")


def test_a_thousand_brackets_are_refused_and_not_a_crash() -> None:
    for text in ("(" * 1000 + "true", "not " * 1000 + "true", "[" * 1000):
        with pytest.raises(ConfigError):
            parse(text)


def test_a_reference_alone_keeps_its_type_and_one_in_a_text_is_written_into_it() -> None:
    look_up = partial(find, {"tp": 3, "steps": {"a": {"artifact": "/x"}}})
    value = {"tp": "${tp}", "path": "${steps.a.artifact}/sub", "list": ["$${tp}", "TP${tp}"]}
    assert substitute(value, look_up) == {"tp": 3, "path": "/x/sub", "list": ["${tp}", "TP3"]}
    assert list(references_in(value)) == ["tp", "steps.a.artifact", "tp"]
