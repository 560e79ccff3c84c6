"""Grammars compiled for one tokenizer: on worker threads, within a time, and once for equal constraints.

A compiled grammar is copied for each answer; the copies share what the automaton has learned. Compiling stops by
itself when its time is over, so a caller that goes away leaves nothing running for long.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitedTooLong
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from ferry.core.errors import FerryError
from ferry.guided.building import build
from ferry.guided.matcher import Matcher
from ferry.guided.refusal import Refusal
from ferry.guided.request import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

DEFAULT_TIME_LIMIT_S = 5.0
DEFAULT_CACHE_SIZE = 256
_LISTING = re.compile(r"\s*(\d+ \||\^+\s*$)")


@dataclass(frozen=True)
class Compiled:
    """A constraint ready for any number of answers. `lark` is its grammar as engines take it."""

    constraint: Constraint
    lark: str
    notes: tuple[str, ...]
    num_tokens: int
    end_tokens: tuple[int, ...]
    automaton: LLMatcher
    tokenizer: LLTokenizer
    seconds: float

    def matcher(self) -> Matcher:
        """Return the state of a new answer."""
        return Matcher(self.automaton.deep_copy(), self.num_tokens, self.end_tokens)

    def tokenize(self, text: str) -> list[int]:
        """Return a text as tokens, whatever bytes it has."""
        return list(self.tokenizer.tokenize_bytes(text.encode("utf-8")))


def tokenizer_of(tokenizer: Any, num_tokens: int, end_tokens: Sequence[int]) -> LLTokenizer:
    """Return llguidance's form of a fast tokenizer of transformers, or of the text of a tokenizer.json.

    `num_tokens` is the width of the model's logits, which may be more than the tokenizer has.
    """
    from llguidance import LLTokenizer

    text = tokenizer
    if not isinstance(tokenizer, str):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise Refusal(
                f"guided decoding needs a fast tokenizer, and this one is a {type(tokenizer).__name__}",
                code="guided.tokenizer",
                repair="convert the tokenizer to tokenizer.json",
            )
        text = backend.to_str()
    return LLTokenizer(
        _without_limits(text), n_vocab=num_tokens, eos_token=list(end_tokens), slices=LLTokenizer.json_slices()
    )


class Compiler:
    """Worker threads and the grammars they made for one tokenizer. Close it at the end."""

    def __init__(
        self,
        tokenizer: LLTokenizer,
        *,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
        cache_size: int = DEFAULT_CACHE_SIZE,
        num_threads: int = 1,
    ) -> None:
        self._tokenizer = tokenizer
        self._time_limit_s = time_limit_s
        self._cache_size = cache_size
        self._lock = Lock()
        self._made: OrderedDict[Constraint, Future[Compiled]] = OrderedDict()
        self._workers = ThreadPoolExecutor(num_threads, thread_name_prefix="ferry-guided")

    @property
    def num_tokens(self) -> int:
        """The width of the masks."""
        return int(self._tokenizer.vocab_size)

    def submit(self, constraint: Constraint) -> Future[Compiled]:
        """Return the future of a compiled grammar. Equal constraints share it: leave it, never cancel it."""
        with self._lock:
            future = self._made.get(constraint)
            is_new = future is None
            if future is None:
                future = self._made[constraint] = self._workers.submit(self._compile, constraint)
            self._made.move_to_end(constraint)
            while len(self._made) > self._cache_size:
                self._made.popitem(last=False)
        if is_new:
            # Outside the lock: the future may be done already, and then this calls back at once.
            future.add_done_callback(lambda done: self._forget_failure(constraint, done))
        return future

    def compile(self, constraint: Constraint) -> Compiled:
        """Return a compiled grammar, waiting for it."""
        try:
            return self.submit(constraint).result(timeout=2 * self._time_limit_s)
        except (WaitedTooLong, CancelledError) as error:
            raise self._too_slow() from error

    def close(self) -> None:
        """End the worker threads; what waits is dropped."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _forget_failure(self, constraint: Constraint, done: Future[Compiled]) -> None:
        """Keep errors of the user, which come again, but neither a lack of time nor a defect."""
        error = None if done.cancelled() else done.exception()
        is_kept = isinstance(error, FerryError) and error.code != "guided.too_slow"
        if done.cancelled() or (error is not None and not is_kept):
            with self._lock:
                if self._made.get(constraint) is done:
                    del self._made[constraint]

    def _compile(self, constraint: Constraint) -> Compiled:
        from llguidance import LLMatcher

        begun = time.monotonic()

        def check_time() -> None:
            if time.monotonic() - begun > self._time_limit_s:
                raise self._too_slow()

        grammar = build(constraint, check_time)
        automaton = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar.lark), log_level=0)
        if automaton.is_error():
            raise _refused(constraint, automaton.get_error())
        # The first mask is the dearest: make it here, not in the engine's loop.
        if not any(automaton.compute_bitmask()) or automaton.is_error():
            raise Refusal(
                f"nothing can satisfy {constraint.field}", code="guided.unsatisfiable", keyword=constraint.field
            )
        check_time()
        return Compiled(
            constraint,
            grammar.lark,
            grammar.notes,
            self._tokenizer.vocab_size,
            tuple(self._tokenizer.eos_tokens),
            automaton,
            self._tokenizer,
            time.monotonic() - begun,
        )

    def _too_slow(self) -> Refusal:
        return Refusal(
            f"the grammar took more than {self._time_limit_s:g} s to compile",
            code="guided.too_slow",
            repair="use a simpler schema or pattern",
        )


def _refused(constraint: Constraint, reason: str) -> Refusal:
    """Return llguidance's reason as one line, without the lines of grammar that follow it."""
    line = " ".join(" ".join(part for part in reason.splitlines() if not _LISTING.match(part)).split())
    return Refusal(
        f"{constraint.field} cannot be compiled: {line[:300]}", code="guided.grammar", keyword=constraint.field
    )


def _without_limits(text: str) -> str:
    """Return a tokenizer without padding and truncation, which would spoil single tokens."""
    import json

    parts = json.loads(text)
    parts["padding"] = parts["truncation"] = None
    return json.dumps(parts, ensure_ascii=False)
