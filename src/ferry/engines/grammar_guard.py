"""Watches that an engine of others keeps the grammar it was given: what it answers is walked along here too.

llama.cpp goes on without a constraint, and without a word, where its own copy of llguidance will not take the grammar
or gives up in the middle.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from ferry.guided.compiling import tokenizer_of
from ferry.guided.refusal import Refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ferry.engines.text import TextModel

CACHE_SIZE = 64
"""Grammars that are kept, the last used ones."""


class GrammarGuard:
    """Makes a watch for each answer of one model."""

    def __init__(self, model: TextModel, num_tokens: int) -> None:
        self._model = model
        self._num_tokens = num_tokens
        self._tokenizer: LLTokenizer | None = None
        self._lock = Lock()
        self._made: OrderedDict[str, asyncio.Task[LLMatcher]] = OrderedDict()

    async def watch(self, grammar: str) -> Watch:
        """Return the watch of a new answer; raise Refusal where the grammar is none. Equal ones are compiled once."""
        made = self._made.get(grammar)
        if made is None:
            made = self._made[grammar] = asyncio.create_task(asyncio.to_thread(self._compile, grammar))
            if len(self._made) > CACHE_SIZE:
                self._made.popitem(last=False)
        self._made.move_to_end(grammar)
        # Others wait for it too: whoever goes away leaves it.
        return Watch((await asyncio.shield(made)).deep_copy())

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        with self._lock:
            if self._tokenizer is None:
                ends = self._model.end_token_ids[:1] or (0,)
                self._tokenizer = tokenizer_of(self._model.vocabulary.source, self._num_tokens, ends)
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise Refusal(f"the grammar cannot be compiled: {reason[:300]}", code="guided.grammar")
        return matcher


class Watch:
    """The state of one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def keeps(self, token_ids: Sequence[int]) -> bool:
        """Walk along with further tokens, without an end token; say whether they keep the grammar."""
        return all(self._matcher.consume_token(token) for token in token_ids)
