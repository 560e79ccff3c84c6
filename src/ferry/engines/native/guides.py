"""Grammars of requests: compiled on worker threads, once for equal texts; and what a grammar allows next.

The loop never waits for a compilation. Tokens that end an answer are no part of a grammar: they are allowed where it
may end, and nowhere else.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from ferry.core.errors import InputError
from ferry.engines.native.sampler import Float32
from ferry.guided.compiling import tokenizer_of
from ferry.guided.matcher import Matcher
from ferry.guided.refusal import Refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHE_SIZE = 128
NUM_THREADS = 2
"""A grammar that takes long does not hold the next one up."""
LIMITS: Float32 = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf
).astype(np.float32)
"""For each byte of a mask the most that the logits of its eight tokens may be."""


class Guide:
    """What a grammar allows in one answer."""

    def __init__(
        self, automaton: LLMatcher, num_tokens: int, end_tokens: Sequence[int], own_ends: Sequence[int]
    ) -> None:
        self._ends = [token for token in end_tokens if token < num_tokens]
        self._no_text = sorted({*self._ends, *own_ends})
        self._matcher = Matcher(automaton, num_tokens, self._ends)

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_done

    def allows(self, token: int) -> bool:
        """Return whether a token may come next."""
        if token in self._no_text:
            return token in self._ends and self._matcher.may_end
        return self._matcher.allows(token)

    def likeliest(self, row_V: Float32) -> int | None:
        """Return the likeliest of the tokens that may come next, None where there is none; the row stays as it is."""
        allowed_V = np.unpackbits(self._matcher.mask().view(np.uint8), bitorder="little")[: len(row_V)]
        allowed_V[self._no_text] = 0
        if self._ends and self._matcher.may_end:
            allowed_V[self._ends] = 1
        ids = np.flatnonzero(allowed_V)
        return int(ids[row_V[ids].argmax()]) if len(ids) else None

    def limit(self, row_V: Float32) -> None:
        """Make the logits of all tokens that may not come next -inf. Raise Refusal where it grows too large."""
        row_of_ends = row_V[self._ends]
        limits_V = LIMITS[self._matcher.mask().view(np.uint8)].reshape(-1)[: len(row_V)]
        np.minimum(row_V, limits_V, out=row_V)
        row_V[self._no_text] = -np.inf
        if self._ends and self._matcher.may_end:
            row_V[self._ends] = row_of_ends

    def take(self, token: int) -> None:
        """Go on with a token that was allowed."""
        self._matcher.take(token)


class Guides:
    """The worker threads and what they compiled for one model. Close it at the end."""

    def __init__(self, model: Path, num_tokens: int, *, trust_remote_code: bool = False) -> None:
        self._model = model
        self._num_tokens = num_tokens
        self._trust_remote_code = trust_remote_code
        self._own_ends = [token for token in end_tokens_of(model) if token < num_tokens]
        self._tokenizer: LLTokenizer | None = None
        self._lock = Lock()
        self._made: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._workers = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="ferry-grammar")

    def submit(self, lark: str) -> Future[LLMatcher]:
        """Return the future of a grammar. Equal ones share it: leave it, never cancel it."""
        if lark not in self._made:
            self._made[lark] = self._workers.submit(self._compile, lark)
        self._made.move_to_end(lark)
        if len(self._made) > CACHE_SIZE:
            self._made.popitem(last=False)
        return self._made[lark]

    def guide(self, automaton: LLMatcher, end_tokens: Sequence[int]) -> Guide:
        """Return the state of a new answer."""
        return Guide(automaton.deep_copy(), self._num_tokens, end_tokens, self._own_ends)

    def close(self) -> None:
        """End the worker threads; what waits is dropped."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _compile(self, lark: str) -> LLMatcher:
        from llguidance import LLMatcher

        with self._lock:
            if self._tokenizer is None:
                text = _tokenizer_text(self._model, self._trust_remote_code)
                self._tokenizer = tokenizer_of(text, self._num_tokens, self._own_ends)
        automaton = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
        if not automaton.is_error():
            # The first mask is the dearest: make it here.
            automaton.compute_bitmask()
        if automaton.is_error():
            reason = " ".join(automaton.get_error().split())[:300]
            raise Refusal(f"the grammar cannot be compiled: {reason}", code="guided.grammar")
        return automaton


def end_tokens_of(model: Path) -> list[int]:
    """Return the tokens that end a text, as the files of a model say."""
    for name in ("generation_config.json", "config.json"):
        path = model / name
        found: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return [int(token) for token in (found if isinstance(found, list) else [found])]
    return []


def _tokenizer_text(model: Path, trust_remote_code: bool) -> Any:
    """Return the text of tokenizer.json, or a tokenizer that has one inside."""
    path = model / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{model} has no tokenizer that grammars could be compiled for: {' '.join(str(error).split())[:200]}",
            code="guided.tokenizer",
            repair="put a tokenizer.json beside the weights",
        ) from None
