"""Patterns, formats and ranges of numbers: the automaton and our own matcher agree, on both sides of each limit."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from ferry.guided import numbers, regexes, texts
from ferry.guided.byte_tokenizer import byte_tokenizer
from ferry.guided.regexes import PatternError
from ferry.guided.shapes import Number, Text
from guided.writing import accepts

PATTERNS = [
    "^\\w$", "^\\d$", "^\\s$", ".", "^a|b$", "^$", "(^a$|^b$)", "^\\p{L}$", "^[^a]$", "^\\S+$", "a{2,}?", "^a\\/b$",
    "^\\cA$", "^[\\w-]+$", "\\u00e9", "(?<n>a)", '[\\\\"]', '^[^"]*$', "(^|x)y", "n", "^[\\n]$", "[^\\W]", "^\\P{L}+$",
    "a*", "^a{0}$", "[]", "^[^]$", "x{y}",
]  # fmt: skip
STRINGS = [
    "", "a", "é", "1", "١", "b", " ", "\u00a0", "xbx", "a\n", "\n", "foo", "a/b", "\x01", '"', "\\", "y", "xy", "zy",
    "n", "aa", "\U0001f600", "\x7f", "x{y}",
]  # fmt: skip
LIMITS = [Fraction(text) for text in ("0", "-0.5", "0.5", "1", "-1", "9", "10", "-10", "99.95", "-99.95", "1.05")]
DECIMALS = [
    "0", "-0", "0.0", "-0.00", "0.1", "-0.1", "0.5", "0.50", "0.500", "-0.5", "-0.49", "-0.51", "0.51", "1", "1.0",
    "1.01", "-1", "-1.0", "2", "-2.1", "9", "9.5", "10", "-10", "-10.5", "99.95", "99.94", "99.96", "99.9", "100",
    "1.05", "1.04", "1.06", "123456789012345678901", "-99.95", "-99.96", "-100",
]  # fmt: skip


def automaton(terminal: str) -> LLMatcher:
    matcher = LLMatcher(byte_tokenizer(), LLMatcher.grammar_from_lark(f"start: T\nT: {terminal}"), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_in_the_grammar_takes_the_strings_that_it_matches(pattern: str) -> None:
    matching = automaton(texts.terminal(Text(patterns=frozenset({pattern}))))
    others = automaton(texts.terminal(Text(unmatched=frozenset({pattern}))))
    for string in STRINGS:
        found = regexes.search(pattern, string)
        assert accepts(matching, texts.spelled(string)) is found, string
        assert accepts(others, texts.spelled(string)) is not found, string


@given(st.text(alphabet='ab\n\\"1é', max_size=5), st.sampled_from(["^a", "b$", "^[ab]*$", "a.b", "[^a1]$", "^(a|b)+$"]))
@settings(max_examples=200, deadline=None)
def test_our_matcher_agrees_with_that_of_python(string: str, pattern: str) -> None:
    assert regexes.search(pattern, string) is bool(re.search(pattern.replace("$", "\\Z"), string))


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_string_has_one_spelling_and_it_is_json(string: str) -> None:
    assert json.loads(texts.spelled(string)) == string


@pytest.mark.parametrize(
    "pattern", ["(?=a)", "(?<!a)b", "(a)\\1", "\\bfoo", "(", "a)", "[", "*a", "a{3,2}", "[b-a]", "\\", "\\p{Nonsense}"]
)
def test_a_pattern_that_no_automaton_matches_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        regexes.parse(pattern)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("is_open", [False, True])
def test_a_range_of_numbers_ends_where_it_says(limit: Fraction, is_open: bool) -> None:
    above = automaton(numbers.terminal(Number(low=limit, low_open=is_open)))
    below = automaton(numbers.terminal(Number(high=limit, high_open=is_open)))
    whole = automaton(numbers.terminal(Number(low=limit, low_open=is_open, multiple=Fraction(1))))
    broken = automaton(numbers.terminal(Number(high=limit, high_open=is_open, off=frozenset({Fraction(1)}))))
    for text in DECIMALS:
        value = Fraction(text)
        over, under = (
            value > limit or (value == limit and not is_open),
            value < limit or (value == limit and not is_open),
        )
        assert accepts(above, text) is over, text
        assert accepts(below, text) is under, text
        assert accepts(whole, text) is (over and "." not in text), text
        assert accepts(broken, text) is (under and value.denominator != 1), text


@pytest.mark.parametrize(
    ("step", "inside", "outside"),
    [("0.01", ["1", "0.07", "-3.10", "1.100"], ["0.001", "1.005"]), ("100", ["0", "1200"], ["1210", "10"])],
)
def test_multiples_of_powers_of_ten_are_exact(step: str, inside: list[str], outside: list[str]) -> None:
    matcher = automaton(numbers.terminal(Number(multiple=Fraction(step))))
    assert [text for text in inside if not accepts(matcher, text)] == []
    assert [text for text in outside if accepts(matcher, text)] == []


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31", "0000-01-01"]),
        ("time", ["23:59:59Z", "00:00:00.5+01:30"], ["24:00:00Z", "12:00:00", "12:00Z"]),
        ("date-time", ["2024-02-29T12:00:00Z"], ["2024-02-30T12:00:00Z", "2024-02-29 12:00:00Z"]),
        ("duration", ["P1Y2M3D", "PT36H", "P4W"], ["P", "PT", "P1D2H", "1Y"]),
        ("email", ["a.b+c@example.com"], ["a@", "@b", "a b@c", ".a@b"]),
        ("hostname", ["a.example-1.com"], ["-a.com", "a..b", "a_b"]),
        ("ipv4", ["127.0.0.1", "255.255.255.255"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
        ("ipv6", ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "fe80::1:2"], ["1:2:3", ":::", "1::2::3", "12345::"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
        ("uri", ["https://example.com/a?b#c", "mailto:a@b"], ["//a/b", "a b", "1http://x", "http://"]),
        ("json-pointer", ["", "/a/~0~1"], ["a", "/~2"]),
    ],
)
def test_a_format_is_what_its_standard_says(name: str, right: list[str], wrong: list[str]) -> None:
    limits = Text(formats=frozenset({name}))
    matcher = automaton(texts.terminal(limits))
    for string in [*right, *wrong]:
        assert texts.fits(string, limits) is (string in right), string
        assert accepts(matcher, texts.spelled(string)) is (string in right), string


def test_an_address_of_protocol_six_is_what_python_reads() -> None:
    import ipaddress

    def reads(text: str) -> bool:
        try:
            ipaddress.IPv6Address(text)
        except ValueError:
            return False
        return True

    samples = ["1:" * left + ":" + "2:" * right + "3" for left in range(9) for right in range(9)]
    samples += ["1:" * left + ":" for left in range(1, 9)]
    for text in samples:
        assert texts.fits(text, Text(formats=frozenset({"ipv6"}))) is reads(text), text
