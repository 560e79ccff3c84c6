"""From the text of a gate to its tree: one token ahead, one function for each level of binding.

either   both or both ...
both     not and not ...
not      `not` not | operand | operand sign operand
operand  name | number | 'text' | "text" | true | false | null | [operand, ...] | (either)
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ferry.control.voyage.expression import Comparison, Constant, Items, Junction, Name, Negation, Tree
from ferry.core.errors import ConfigError

COMPARISONS = ("==", "!=", "<=", ">=", "<", ">", "in", "not in")
CONSTANTS = {"true": True, "false": False, "null": None}
TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])
    |(?P<text>'[^']*'|"[^"]*")
    |(?P<name>[A-Za-z_][\w-]*(?:\.[\w-]+)*)
    |(?P<sign>==|!=|<=|>=|[<>()\[\],]))""",
    re.VERBOSE,
)
MAX_DEPTH = 50


def parse(text: str) -> Tree:
    """Return the tree of a gate; raise ConfigError saying where it stops making sense."""
    parser = _Parser(text)
    tree = parser.either(0)
    if parser.kind != "end":
        raise parser.error("an end, `and` or `or`")
    return tree


class _Parser:
    """The place in a text, and the token there."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.place = 0
        self.kind = ""
        self.text = ""
        self.start = 0
        self.step()

    def step(self) -> str:
        """Move to the next token and return the text of the last one."""
        last = self.text
        found = TOKEN.match(self.source, self.place)
        if found:
            self.kind, self.text = next((kind, text) for kind, text in found.groupdict().items() if text is not None)
            self.place, self.start = found.end(), found.end() - len(self.text)
        else:
            rest = self.source[self.place :].strip()
            self.kind, self.text = ("unknown", rest) if rest else ("end", "")
            self.start = self.place
        if self.kind == "name" and self.text in ("and", "or", "not", "in"):
            self.kind = "word"
        return last

    def error(self, expected: str) -> ConfigError:
        found = f"found {self.text[:20]!r} at column {self.start + 1}" if self.text else "found its end"
        return ConfigError(f"gate {self.source!r}: expected {expected}, {found}", code="gate.syntax")

    def either(self, depth: int) -> Tree:
        return self._junction("or", self._both, depth)

    def _both(self, depth: int) -> Tree:
        return self._junction("and", self._not, depth)

    def _junction(self, word: str, inner: Callable[[int], Tree], depth: int) -> Tree:
        parts = [inner(depth)]
        while self.kind == "word" and self.text == word:
            self.step()
            parts.append(inner(depth))
        return parts[0] if len(parts) == 1 else Junction(word, tuple(parts))

    def _not(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise self.error(f"at most {MAX_DEPTH} brackets within each other")
        if self.kind == "word" and self.text == "not":
            self.step()
            return Negation(self._not(depth + 1))
        left = self._operand(depth)
        sign = self._sign()
        if not sign:
            return left
        tree = Comparison(sign, left, self._operand(depth))
        if self._sign():
            raise self.error("one comparison at a time, joined by `and`")
        return tree

    def _sign(self) -> str:
        if self.kind == "word" and self.text == "not":
            self.step()
            if self.text != "in":
                raise self.error("`in` after `not`")
            self.step()
            return "not in"
        if (self.kind == "sign" or self.kind == "word") and self.text in COMPARISONS:
            return self.step()
        return ""

    def _operand(self, depth: int) -> Tree:
        if self.kind == "number":
            text = self.step()
            return Constant(int(text) if text.lstrip("-").isdigit() else float(text))
        if self.kind == "text":
            return Constant(self.step()[1:-1])
        if self.kind == "name":
            text = self.step()
            return Constant(CONSTANTS[text]) if text in CONSTANTS else Name(text)
        if self.text == "(" and self.kind == "sign":
            self.step()
            tree = self.either(depth + 1)
            self._close(")")
            return tree
        if self.text == "[" and self.kind == "sign":
            self.step()
            return self._items(depth + 1)
        raise self.error("a value: a name, a number, quoted text, true, false, null, a list or a bracket")

    def _items(self, depth: int) -> Tree:
        items: list[Tree] = []
        while self.text != "]" or self.kind != "sign":
            if depth > MAX_DEPTH:
                raise self.error(f"at most {MAX_DEPTH} brackets within each other")
            items.append(self._operand(depth))
            if self.text != "," or self.kind != "sign":
                break
            self.step()
        self._close("]")
        return Items(tuple(items))

    def _close(self, bracket: str) -> None:
        if self.kind != "sign" or self.text != bracket:
            raise self.error(f"`{bracket}`")
        self.step()
