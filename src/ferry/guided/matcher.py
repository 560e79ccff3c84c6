"""One answer being written under a constraint: which token may come next, and whether it may end.

The end token is never given to the automaton: it is allowed where the grammar accepts, and after it nothing is. Masks
are rows of 32-bit words, one bit a token, lowest bit first; they lie in a buffer that is used again, so an engine that
keeps one must copy it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ferry.guided.refusal import Refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Matcher:
    """The state of one answer. Not for use from two threads at once."""

    def __init__(self, automaton: LLMatcher, num_tokens: int, end_tokens: Sequence[int]) -> None:
        self._automaton = automaton
        self._end_tokens = frozenset(end_tokens)
        self._words: NDArray[np.int32] = np.zeros((num_tokens + 31) // 32, dtype=np.int32)
        self._ended = False

    @property
    def is_done(self) -> bool:
        """Whether nothing may come any more, not even as a choice."""
        return self._ended or bool(self._automaton.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether what was taken so far is a whole answer."""
        return self._ended or bool(self._automaton.is_accepting())

    def mask(self) -> NDArray[np.int32]:
        """Return which tokens may come next."""
        if self.is_done:
            self._check()
            self._words.fill(0)
            for token in self._end_tokens:
                self._words[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
        else:
            self._automaton.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            self._check()
        return self._words

    def take(self, token: int) -> None:
        """Go on with a token; one that the mask does not allow is an error of the engine."""
        if token in self._end_tokens:
            assert self.may_end, "an answer was ended before it was whole"
            self._ended = True
            return
        assert not self._ended, f"token {token} came after the end"
        taken = self._automaton.consume_token(token)
        self._check()
        assert taken, f"token {token} is outside the mask"

    def allows(self, token: int) -> bool:
        """Return whether a token may come next, without a mask."""
        if token in self._end_tokens:
            return self.may_end
        return not self.is_done and self._automaton.validate_tokens([token]) == 1

    def forced(self) -> list[int]:
        """Return the tokens that must come next, as far as there is no choice."""
        return [] if self.is_done else list(self._automaton.compute_ff_tokens())

    def _check(self) -> None:
        reason = self._automaton.stop_reason()
        if self._automaton.is_error() or reason in ("ParserTooComplex", "LexerTooComplex", "InternalError"):
            raise Refusal(
                f"the grammar grew too complex while the answer was written ({reason})",
                code="guided.too_complex",
                repair="use a simpler schema or pattern",
            )


def tokens_of(mask: NDArray[Any], num_tokens: int) -> NDArray[np.bool_]:
    """Return a mask as one truth value a token."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return bits[:num_tokens].astype(bool)
