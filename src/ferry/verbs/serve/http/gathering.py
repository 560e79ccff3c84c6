"""Whole answers out of pieces, what they cost, and the parts of a response that both ways to ask share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ferry.engines.request import TokenLogprobs
from ferry.guided.validate import Verdict
from ferry.verbs.serve.http.answering import Piece, Token, closing
from ferry.verbs.serve.http.errors import ApiError

JsonObject = dict[str, Any]


@dataclass
class Whole:
    """One answer, all of it."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    last: Piece | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        """Its text."""
        return "".join(self.texts)


@dataclass
class Usage:
    """Tokens of one request. A prompt counts once, however many answers it gets."""

    num_prompt: int
    num_per_prompt: int = 1
    num_generated: int = 0
    num_cached: int = 0

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        self.num_generated += piece.num_generated
        if piece.index % self.num_per_prompt == 0:
            self.num_cached += piece.num_cached

    def to_json(self) -> JsonObject:
        """Return it as clients know it."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


async def gather(pieces: AsyncIterator[Piece], num_answers: int, usage: Usage) -> list[Whole]:
    """Return all answers of a request. One that breaks its promise is an error: it is never given out as an answer."""
    found = [Whole() for _ in range(num_answers)]
    async with closing(pieces) as open_pieces:
        async for piece in open_pieces:
            whole = found[piece.index]
            whole.texts.append(piece.text)
            whole.tokens += piece.tokens
            whole.prompt_logprobs = piece.prompt_logprobs or whole.prompt_logprobs
            usage.add(piece)
            if piece.finish:
                whole.last = piece
                _check_promise(piece.verdict)
    return found


def head_of(kind: str, identity: str, name: str) -> JsonObject:
    """Return what every response begins with."""
    return {"id": identity, "object": kind, "created": int(time.time()), "model": name}


def guided_json(verdict: Verdict | None) -> JsonObject:
    """Return the part of a choice that says whether its constraint is kept."""
    if verdict is None:
        return {}
    if verdict.valid:
        return {"guided": {"valid": True}}
    return {"guided": {"valid": False, "reason": verdict.reason, "pointer": verdict.pointer}}


def warned(warnings: Sequence[str]) -> JsonObject:
    """Return the part of a response that names what was ignored."""
    return {"warnings": list(warnings)} if warnings else {}


def _check_promise(verdict: Verdict | None) -> None:
    if verdict is not None and not verdict.valid and not verdict.cut:
        raise ApiError(500, f"the answer does not keep its constraint: {verdict.reason}", code="guided.broken")
