"""Patterns of JSON Schema: ECMA-262 regular expressions, read into a tree.

Two uses of one tree, so that decoding and the last check agree: `search` runs a pattern over a string, and `quoted`
writes it as a regular expression over the *text* of a JSON string, quotes and escapes included. What a finite automaton
cannot do (look-around, back references, word boundaries) is refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

LAST = 0x10FFFF
SPECIAL = [*range(0x20), 0x22, 0x5C]
SHORT_ESCAPES = {0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0C: "\\f", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
UNIT = r'(?:[^"\\\x00-\x1f]|\\["\\bfnrt]|\\u00(?:0[0-7bef]|1[0-9a-f]))'
PLAIN = r'[^"\\\x00-\x1f]'
NOTHING = r"[^\x{0}-\x{10FFFF}]"
MAX_REPEAT = 10_000

DIGITS = ((0x30, 0x39),)
WORD = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE = (
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
LINE_ENDS = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
CATEGORIES = {
    "Letter": "L", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Titlecase_Letter": "Lt", "Number": "N",
    "Decimal_Number": "Nd", "digit": "Nd", "Punctuation": "P", "punct": "P", "Symbol": "S", "Separator": "Z",
    "Mark": "M", "Other": "C", "Control": "Cc",
}  # fmt: skip


class PatternError(ValueError):
    """A pattern that cannot be read, or that no finite automaton matches."""


@dataclass(frozen=True)
class Chars:
    """One character of a set: ranges of code points and Unicode categories, or all others."""

    ranges: tuple[tuple[int, int], ...]
    categories: tuple[tuple[str, bool], ...] = ()
    negated: bool = False

    def __contains__(self, character: str) -> bool:
        point = ord(character)
        found = any(low <= point <= high for low, high in self.ranges) or any(
            unicodedata.category(character).startswith(name) is wanted for name, wanted in self.categories
        )
        return found is not self.negated


@dataclass(frozen=True)
class Edge:
    """`^` or `$`."""

    start: bool


@dataclass(frozen=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    part: Node
    low: int
    high: int | None


Node: TypeAlias = Chars | Edge | Sequence | Choice | Repeat


def search(pattern: str, text: str) -> bool:
    """Return whether a pattern matches somewhere in a text."""
    return bool(_ends(parse(pattern), text, set(range(len(text) + 1))))


def quoted(pattern: str) -> str:
    """Return a regular expression of the JSON strings in which a pattern matches somewhere.

    `^` and `$` become the quotes, so it is right only together with "is a JSON string".
    """
    return f'(?:"{UNIT}*)?(?:{_written(parse(pattern))})(?:{UNIT}*")?'


def exactly(text: str) -> str:
    """Return a regular expression that matches one text."""
    return "".join(_escaped(ord(character)) for character in text)


@lru_cache(maxsize=1024)
def parse(pattern: str) -> Node:
    """Return the tree of a pattern."""
    reader = _Reader(pattern)
    tree = reader.choice()
    if reader.rest():
        raise PatternError(f"unmatched ')' in pattern {pattern!r}")
    return tree


def alphabet(node: Node) -> Iterator[Chars]:
    """Yield every set of characters in a tree."""
    if isinstance(node, Chars):
        yield node
    elif isinstance(node, (Sequence, Choice)):
        for part in node.parts:
            yield from alphabet(part)
    elif isinstance(node, Repeat):
        yield from alphabet(node.part)


def has_edges(node: Node) -> bool:
    """Return whether `^` or `$` is in a tree."""
    if isinstance(node, (Sequence, Choice)):
        return any(has_edges(part) for part in node.parts)
    return has_edges(node.part) if isinstance(node, Repeat) else isinstance(node, Edge)


class _Reader:
    """A position in the text of a pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def rest(self) -> str:
        return self.pattern[self.at :]

    def take(self, count: int = 1) -> str:
        taken = self.pattern[self.at : self.at + count]
        if len(taken) < count:
            raise PatternError(f"pattern {self.pattern!r} ends too early")
        self.at += count
        return taken

    def accept(self, text: str) -> bool:
        if self.pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def choice(self) -> Node:
        parts = [self.sequence()]
        while self.accept("|"):
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def sequence(self) -> Node:
        parts: list[Node] = []
        while self.rest() and self.rest()[0] not in "|)":
            atom = self.atom()
            parts.append(atom if isinstance(atom, Edge) else self.repeated(atom))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def repeated(self, atom: Node) -> Node:
        for mark, low, high in (("*", 0, None), ("+", 1, None), ("?", 0, 1)):
            if self.accept(mark):
                self.accept("?")
                return Repeat(atom, low, high)
        end = self.rest().find("}")
        inside = self.rest()[1:end] if self.rest().startswith("{") and end > 0 else ""
        low_text, comma, high_text = inside.partition(",")
        if not low_text.isdecimal() or (high_text and not high_text.isdecimal()):
            return atom
        self.take(end + 1)
        self.accept("?")
        low_count = int(low_text)
        high_count = (int(high_text) if high_text else None) if comma else low_count
        if max(low_count, high_count or 0) > MAX_REPEAT:
            raise PatternError(f"pattern {self.pattern!r} repeats more than {MAX_REPEAT} times")
        if high_count is not None and high_count < low_count:
            raise PatternError(f"numbers out of order in {{{inside}}} of pattern {self.pattern!r}")
        return Repeat(atom, low_count, high_count)

    def atom(self) -> Node:
        character = self.take()
        if character == "(":
            return self.group()
        if character == "[":
            return self.bracket()
        if character == ".":
            return Chars(LINE_ENDS, negated=True)
        if character in "^$":
            return Edge(start=character == "^")
        if character == "\\":
            return self.escape(inside=False)
        if character in "*+?":
            raise PatternError(f"nothing to repeat before {character!r} in pattern {self.pattern!r}")
        return _one(ord(character))

    def group(self) -> Node:
        if self.accept("?"):
            if self.accept("<") and self.rest()[:1] not in ("=", "!"):
                self.take(self.rest().find(">") + 1)
            elif not self.accept(":"):
                raise PatternError(f"look-around or flags in pattern {self.pattern!r}")
        inner = self.choice()
        if not self.accept(")"):
            raise PatternError(f"missing ')' in pattern {self.pattern!r}")
        return inner

    def bracket(self) -> Node:
        negated = self.accept("^")
        ranges: list[tuple[int, int]] = []
        categories: list[tuple[str, bool]] = []
        while not self.accept("]"):
            item = self.class_item()
            if self.rest()[:1] == "-" and self.rest()[1:2] not in ("", "]") and _single(item):
                self.take()
                other = self.class_item()
                if not _single(other):
                    ranges += [*item.ranges, (0x2D, 0x2D)]
                    item = other
                elif other.ranges[0][0] < item.ranges[0][0]:
                    raise PatternError(f"range out of order in pattern {self.pattern!r}")
                else:
                    item = Chars(((item.ranges[0][0], other.ranges[0][0]),))
            ranges += item.ranges
            categories += item.categories
        return Chars(tuple(ranges), tuple(categories), negated)

    def class_item(self) -> Chars:
        character = self.take()
        return self.escape(inside=True) if character == "\\" else _one(ord(character))

    def escape(self, inside: bool) -> Chars:
        letter = self.take()
        sets = {"d": DIGITS, "w": WORD, "s": SPACE}
        if letter.lower() in sets:
            ranges = sets[letter.lower()]
            return Chars(ranges if letter.islower() else _others(ranges))
        if letter in "pP":
            return self.category(wanted=letter == "p")
        plain = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}
        if letter in plain:
            return _one(plain[letter])
        if letter == "b" and inside:
            return _one(0x08)
        if letter == "c":
            return _one(ord(self.take()) % 32)
        if letter in "xu":
            return _one(self.code_point(letter))
        if letter.isalnum():
            what = "back references" if letter.isdecimal() or letter == "k" else f"'\\{letter}'"
            raise PatternError(f"{what} in pattern {self.pattern!r}")
        return _one(ord(letter))

    def code_point(self, letter: str) -> int:
        if letter == "u" and self.accept("{"):
            digits = self.take(self.rest().find("}") + 1)[:-1]
        else:
            digits = self.take(2 if letter == "x" else 4)
        try:
            point = int(digits, 16)
        except ValueError as error:
            raise PatternError(f"'\\{letter}{digits}' in pattern {self.pattern!r}") from error
        if 0xD800 <= point <= 0xDBFF and self.accept("\\u"):
            return 0x10000 + ((point - 0xD800) << 10) + int(self.take(4), 16) - 0xDC00
        return point

    def category(self, wanted: bool) -> Chars:
        if not self.accept("{"):
            raise PatternError(f"'\\p' without a name in pattern {self.pattern!r}")
        name = self.take(self.rest().find("}") + 1)[:-1].rpartition("=")[2]
        short = CATEGORIES.get(name, name)
        if short[:1] not in "LMNPSZC" or len(short) > 2 or not short:
            raise PatternError(f"Unicode property {name!r} in pattern {self.pattern!r}")
        return Chars((), ((short, wanted),))


def _one(point: int) -> Chars:
    return Chars(((point, point),))


def _single(item: Chars) -> bool:
    return len(item.ranges) == 1 and item.ranges[0][0] == item.ranges[0][1] and not item.categories


def _others(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    out, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            out.append((at, low - 1))
        at = max(at, high + 1)
    return tuple([*out, (at, LAST)] if at <= LAST else out)


def _ends(node: Node, text: str, starts: set[int]) -> set[int]:
    """Return where a match can end that begins at one of some positions."""
    if isinstance(node, Chars):
        return {at + 1 for at in starts if at < len(text) and text[at] in node}
    if isinstance(node, Edge):
        return starts & {0 if node.start else len(text)}
    if isinstance(node, Choice):
        return set().union(*(_ends(part, text, starts) for part in node.parts))
    if isinstance(node, Sequence):
        for part in node.parts:
            starts = _ends(part, text, starts)
        return starts
    reached = starts
    for _ in range(node.low):
        reached = _ends(node.part, text, reached)
    found, rounds = set(reached), node.low
    while reached and (node.high is None or rounds < node.high):
        reached = _ends(node.part, text, reached) - found
        found |= reached
        rounds += 1
    return found


def _written(node: Node) -> str:
    """Return a tree as a regular expression over the text of a JSON string."""
    if isinstance(node, Chars):
        return _written_chars(node)
    if isinstance(node, Edge):
        return '"'
    if isinstance(node, Sequence):
        return "".join(f"(?:{_written(part)})" if isinstance(part, Choice) else _written(part) for part in node.parts)
    if isinstance(node, Choice):
        return "|".join(_written(part) for part in node.parts)
    count = f"{{{node.low},{'' if node.high is None else node.high}}}"
    return f"(?:{_written(node.part)}){count}"


def _written_chars(chars: Chars) -> str:
    items = "".join(_range(low, high) for low, high in chars.ranges)
    items += "".join(f"\\{'p' if wanted else 'P'}{{{name}}}" for name, wanted in chars.categories)
    escapes = [_spelled(point) for point in SPECIAL if chr(point) in chars]
    plain = f"[{'^' if chars.negated else ''}{items}]" if items else PLAIN if chars.negated else NOTHING
    if escapes:
        plain = f"[{plain}&&{PLAIN}]"
    return f"(?:{'|'.join([plain, *escapes])})" if escapes else plain


def _spelled(point: int) -> str:
    """Return the one way in which we write a special character in a JSON string, as a regular expression."""
    return exactly(SHORT_ESCAPES.get(point, f"\\u{point:04x}"))


def _escaped(point: int) -> str:
    character = chr(point)
    return character if character.isalnum() and point < 128 else f"\\x{{{point:X}}}"


def _range(low: int, high: int) -> str:
    """Return a range without surrogates, which no regular expression over UTF-8 has."""
    if low < 0xD800 and high > 0xDFFF:
        return _range(low, 0xD7FF) + _range(0xE000, high)
    if low >= 0xD800 and high <= 0xDFFF:
        return ""
    low, high = (0xE000 if 0xD800 <= low <= 0xDFFF else low), (0xD7FF if 0xD800 <= high <= 0xDFFF else high)
    return _escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}"
