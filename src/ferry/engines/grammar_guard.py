"""Watches that an engine of others keeps the grammar it was given: what it answers is walked along here too.

llama.cpp goes on without a constraint, and without a word, where its own copy of llguidance will not take the grammar
or gives up in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ferry.guided.compiling import tokenizer_of
from ferry.guided.refusal import Refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ferry.engines.text import TextModel


class GrammarGuard:
    """Makes a watch for each answer of one model."""

    def __init__(self, model: TextModel, num_tokens: int) -> None:
        self._model = model
        self._num_tokens = num_tokens
        self._tokenizer: LLTokenizer | None = None

    def watch(self, grammar: str) -> Watch:
        """Return the watch of a new answer; raise Refusal where the grammar is none."""
        from llguidance import LLMatcher

        if self._tokenizer is None:
            ends = self._model.end_token_ids[:1] or (0,)
            self._tokenizer = tokenizer_of(self._model.vocabulary.source, self._num_tokens, ends)
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise Refusal(f"the grammar cannot be compiled: {reason[:300]}", code="guided.grammar")
        return Watch(matcher)


class Watch:
    """The state of one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def keeps(self, token_ids: Sequence[int]) -> bool:
        """Walk along with further tokens, without an end token; say whether they keep the grammar."""
        return all(self._matcher.consume_token(token) for token in token_ids)
