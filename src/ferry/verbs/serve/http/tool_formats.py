"""How models write calls of tools, as data; and reading calls out of an answer while it comes.

The chat template of a model shows which form it was trained on. A form that is not in the list is not guessed at.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from ferry.engines.vocabulary import Vocabulary


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls: a mark, then JSON with `name` and `arguments` (or `parameters`)."""

    name: str
    template: str
    """A pattern that is in the chat templates of such models."""
    start: str
    """The mark before calls; "" = the answer itself begins with `{`."""
    end: str = ""
    """The mark after each call; "" = none."""
    further_marks: tuple[str, ...] = ()
    argument_keys: tuple[str, ...] = ("arguments", "parameters")


FORMATS = (
    ToolFormat("tagged", r"<tool_call>(?![\s\S]*<function=)", "<tool_call>", "</tool_call>"),
    ToolFormat("listed", r"\[TOOL_CALLS\]", "[TOOL_CALLS]", further_marks=("[ARGS]", "[CALL_ID]")),
    ToolFormat("bare", r"python_tag|\"name\"[^}]{0,40}\"parameters\"", "", further_marks=("<|python_tag|>",)),
)
_BARE_START = re.compile(r"\s*(<\|python_tag\|>)?\s*\{\s*\"(name|type|parameters)\"|\s*<\|python_tag\|>\s*\{")
_MAX_BARE_START = 40


class Call(NamedTuple):
    """One call: the function and its arguments as JSON text."""

    name: str
    arguments: str


class Read(NamedTuple):
    """What was read: text for people, and calls."""

    text: str = ""
    calls: tuple[Call, ...] = ()


def format_of(template: str) -> ToolFormat | None:
    """Return the form in which a model with this chat template writes calls."""
    return next((one for one in FORMATS if re.search(one.template, template)), None)


def marks_of(form: ToolFormat, vocabulary: Vocabulary) -> frozenset[int]:
    """Return the special tokens that must stay in the text for calls to be found."""
    found = (vocabulary.id_of(mark) for mark in (form.start, form.end, *form.further_marks) if mark)
    return frozenset(one for one in found if one is not None and one in vocabulary.special_ids)


class CallReader:
    """Parts an answer into text and calls. Text that may be the beginning of a call waits; calls come when complete."""

    def __init__(self, form: ToolFormat, *, only_one: bool = False) -> None:
        self._form = form
        self._only_one = only_one
        self._held = ""
        self._has_begun = False
        """Whether text was given out already: then a bare call can no longer begin."""
        self.num_calls = 0

    def add(self, text: str) -> Read:
        """Return what is certain after some more text."""
        self._held += text
        return self._read(is_end=False)

    def finish(self) -> Read:
        """Return the rest; a call that is not complete is text."""
        return self._read(is_end=True)

    def _read(self, *, is_end: bool) -> Read:
        texts, calls = [], []
        while True:
            found = self._next(is_end)
            if found is None:
                break
            if isinstance(found, str):
                texts.append(found)
                self._has_begun = self._has_begun or bool(found.strip())
            else:
                calls += found
        if self._only_one:
            texts, calls = ([], []) if self.num_calls else (texts, calls[:1])
        self.num_calls += len(calls)
        text = "".join(texts)
        # White space around calls belongs to their form, not to what the model says.
        return Read("" if self.num_calls and not text.strip() else text, tuple(calls))

    def _next(self, is_end: bool) -> str | list[Call] | None:
        """Take the next certain thing off what is held."""
        if not self._held:
            return None
        begun = self._begun()
        if begun is None:
            return self._take_text(is_end)
        before, body_start = begun
        if before:
            return self._take(before)
        calls, length = self._calls(self._held[body_start:], is_end)
        if calls:
            self._take(body_start + length)
            return calls
        return self._take(len(self._held)) if is_end or length < 0 else None

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _begun(self) -> tuple[int, int] | None:
        """Return where the mark of a call begins and where its body does."""
        if self._form.start:
            at = self._held.find(self._form.start)
            return None if at < 0 else (at, at + len(self._form.start))
        if self._has_begun and not self.num_calls:
            return None
        separator = re.match(r"\s*;?\s*", self._held) if self.num_calls else None
        offset = separator.end() if separator else 0
        match = _BARE_START.match(self._held, offset)
        return None if match is None else (0, self._held.index("{", offset))

    def _take_text(self, is_end: bool) -> str | None:
        """Return the text before what may become the mark of a call."""
        if is_end:
            return self._take(len(self._held))
        if not self._form.start:
            is_open = (not self._has_begun or self.num_calls > 0) and len(self._held) < _MAX_BARE_START
            may_be = re.match(r"[\s;]*(\{|<|$)", self._held)
            return None if is_open and may_be else self._take(len(self._held))
        mark = self._form.start
        held = next((n for n in range(min(len(mark) - 1, len(self._held)), 0, -1) if self._held.endswith(mark[:n])), 0)
        return self._take(len(self._held) - held) or None

    def _calls(self, body: str, is_end: bool) -> tuple[list[Call], int]:
        """Return the calls of one body and its length; no calls and a negative length if it is none."""
        named = re.match(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\]", body)
        start = named.end() if named else len(body) - len(body.lstrip())
        if start == len(body):
            return [], 0
        if self._form.end and self._form.end not in body and not is_end:
            return [], 0
        try:
            value, end = json.JSONDecoder().raw_decode(body, start)
        except ValueError:
            end_mark = body.find(self._form.end) if self._form.end else -1
            return [], -1 if end_mark >= 0 else 0
        if named:
            value = {"name": named[1], "arguments": value}
        rest = body[end:]
        if self._form.end:
            tail = len(rest) - len(rest.lstrip())
            end += tail + len(self._form.end) if rest[tail:].startswith(self._form.end) else 0
        calls = [self._call(one) for one in (value if isinstance(value, list) else [value])]
        return ([one for one in calls if one], end) if calls and all(calls) else ([], -1)

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments: Any = next((value[key] for key in self._form.argument_keys if key in value), {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Call(value["name"], written)
