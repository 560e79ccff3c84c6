"""Tokens back to text while they come, and the texts at which an answer stops.

What is given out is never taken back: bytes wait until they are a character, and text waits while it may become a stop
text. How tokens were cut into pieces on the way changes nothing in the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from ferry.engines.vocabulary import Vocabulary


class Detokenizer:
    """The text of one answer. Special tokens are left out unless wanted, save those in `keep`."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool = True, keep: Collection[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._left_out = (vocabulary.special_ids if skip_special_tokens else frozenset()) - frozenset(keep)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens complete. Bytes that can be no text become replacement characters."""
        kept = (one for one in token_ids if one not in self._left_out)
        return self._decoder.decode(b"".join(map(self._vocabulary.token_bytes, kept)))

    # There is no `finish`: a character that was cut off by the limit of tokens is no text.


class Cut(NamedTuple):
    """Text that may be given out, and the stop text that ended it, if one did."""

    text: str
    stop: str | None = None


class StopTexts:
    """Looks for stop texts in the text of one answer. The one that is complete first counts."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def add(self, text: str) -> Cut:
        """Return what may be given out of the text so far."""
        if not self._stops:
            return Cut(text)
        held = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if ends:
            end, start, stop = min(ends)
            self._held = ""
            return Cut(held[: end if self._include else start], stop)
        num_held = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - num_held :]
        return Cut(held[: len(held) - num_held])

    def pass_by(self, text: str) -> Cut:
        """Return the text without looking: there are tokens before which no answer may stop."""
        held, self._held = self._held, ""
        return Cut(held + text)

    def finish(self) -> str:
        """Return what was held back, as no stop text came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
