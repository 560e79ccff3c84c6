"""Formats of strings as patterns, and sets of strings as terminals of a grammar.

A format that is wider than we can say is narrowed (`iri` to `uri`): what is written is right, some right strings are
never written. Dates know leap years. What JSON Schema calls no format is an annotation.
"""

from __future__ import annotations

from functools import lru_cache

from ferry.guided import regexes
from ferry.guided.byte_tokenizer import byte_tokenizer
from ferry.guided.regexes import UNIT
from ferry.guided.shapes import Text

_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    r"(?:(?!0000)[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
).replace("(?!0000)[0-9]{4}", "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)")
_ZONE = r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = rf"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,9}})?{_ZONE}"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_GROUP = r"[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    [
        rf"(?:{_GROUP}:){{7}}{_GROUP}",
        *(
            rf"(?:{_GROUP}(?::{_GROUP}){{0,{left - 1}}})?::(?:{_GROUP}(?::{_GROUP}){{0,{6 - left}}})?"
            for left in range(1, 7)
        ),
        rf"::(?:{_GROUP}(?::{_GROUP}){{0,6}})?",
        rf"{_GROUP}(?::{_GROUP}){{6}}::",
    ]
)
_PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_AUTHORITY = rf"//(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{{2}})+(?::[0-9]{{1,5}})?(?:/{_PCHAR}*)*"
_URI = rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{_AUTHORITY}|/?{_PCHAR}+(?:/{_PCHAR}*)*){_TAIL}"
_DIGITS = "[0-9]+"
_DURATION_TIME = rf"T(?:{_DIGITS}H(?:{_DIGITS}M(?:{_DIGITS}S)?)?|{_DIGITS}M(?:{_DIGITS}S)?|{_DIGITS}S)"
_DURATION_DATE = rf"(?:{_DIGITS}Y(?:{_DIGITS}M(?:{_DIGITS}D)?)?|{_DIGITS}M(?:{_DIGITS}D)?|{_DIGITS}D)"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}[Tt]{_TIME}",
    "duration": rf"P(?:{_DURATION_DATE}(?:{_DURATION_TIME})?|{_DURATION_TIME}|{_DIGITS}W)",
    "email": rf"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}",
    "uri": _URI,
    "uri-reference": rf"(?:{_URI}|/?(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{{2}})+(?:/{_PCHAR}*)*{_TAIL})",
    "json-pointer": r"(?:/(?:[^~/]|~[01])*)*",
    "relative-json-pointer": r"(?:0|[1-9][0-9]*)(?:#|(?:/(?:[^~/]|~[01])*)*)",
}
NARROWED = {
    "iri": "uri",
    "url": "uri",
    "iri-reference": "uri-reference",
    "uri-template": "uri-reference",
    "idn-email": "email",
    "idn-hostname": "hostname",
}
REFUSED_FORMATS = frozenset({"regex"})


def format_pattern(name: str) -> str:
    return f"^(?:{FORMATS[name]})$"


def fits(text: str, limits: Text) -> bool:
    """Return whether a string is in a set."""
    if limits.values is not None:
        return text in limits.values
    if len(text) < limits.shortest or (limits.longest is not None and len(text) > limits.longest):
        return False
    if text in limits.excluded:
        return False
    patterns = [*limits.patterns, *map(format_pattern, limits.formats)]
    return all(regexes.search(one, text) for one in patterns) and not any(
        regexes.search(one, text) for one in limits.unmatched
    )


def terminal(limits: Text) -> str:
    """Return the terminal of a set of strings that is not finite."""
    length = f"{{{limits.shortest},{'' if limits.longest is None else limits.longest}}}"
    parts = [f'/"{UNIT}{"*" if length == "{0,}" else length}"/']
    patterns = [*sorted(limits.patterns), *map(format_pattern, sorted(limits.formats))]
    parts += [_slashed(regexes.quoted(one)) for one in patterns]
    parts += ["~" + _slashed(regexes.quoted(one)) for one in sorted(limits.unmatched)]
    if limits.excluded:
        parts.append("~(" + " | ".join(literal(one) for one in sorted(limits.excluded)) + ")")
    return " & ".join(parts)


def literal(text: str) -> str:
    """Return the terminal of one string in its one spelling."""
    return _slashed(regexes.exactly(spelled(text)))


def spelled(text: str) -> str:
    """Return a string as JSON text, each character in the one way that terminals allow."""
    return '"' + "".join(_spelled(character) for character in text) + '"'


def is_simple(limits: Text) -> bool:
    """Return whether it is plain that some string fits."""
    strict = len(limits.patterns) + len(limits.formats) + len(limits.unmatched)
    return strict == 0 and (limits.longest is None or not limits.excluded)


@lru_cache(maxsize=4096)
def is_empty(limits: Text) -> bool:
    """Return whether no string fits, by asking the automaton."""
    if limits.values is not None:
        return not limits.values
    if limits.longest is not None and limits.longest < limits.shortest:
        return True
    if limits.patterns & limits.unmatched:
        return True
    if is_simple(limits):
        return False
    from llguidance import LLMatcher

    matcher = LLMatcher(byte_tokenizer(), LLMatcher.grammar_from_lark(f"start: T\nT: {terminal(limits)}"), log_level=0)
    # A string begins with a quote; where nothing can begin, the mask allows the end alone.
    quote = ord('"')
    return matcher.is_error() or not matcher.compute_bitmask()[quote // 8] >> quote % 8 & 1


def _spelled(character: str) -> str:
    point = ord(character)
    if point in regexes.SHORT_ESCAPES:
        return regexes.SHORT_ESCAPES[point]
    return f"\\u{point:04x}" if point < 0x20 else character


def _slashed(expression: str) -> str:
    return "/" + expression.replace("/", "\\/") + "/"
