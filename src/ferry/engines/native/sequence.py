"""One answer being made: its tokens, its blocks, how far the model has read it, and how its next token is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ferry.engines.native.blocks import Int32, key_of
from ferry.engines.request import Request, TokenLogprobs

if TYPE_CHECKING:
    from ferry.engines.native.choosing import Chooser


class Sequence:
    """The state of a request between steps. `order` is its place in the queue, and never changes."""

    __slots__ = (
        "blocks", "chooser", "keys", "longest", "num_cached", "num_computed", "num_named", "num_prompt", "num_tokens",
        "order", "prompt_logprobs", "request", "row", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, chooser: Chooser, longest: int) -> None:
        self.request = request
        self.chooser = chooser
        self.num_prompt = self.num_tokens = len(request.prompt_ids)
        self.longest = min(self.num_prompt + request.sampling.max_tokens, longest)
        """Tokens at most, prompt and answer."""
        self.tokens: Int32 = np.empty(self.longest, np.int32)
        self.tokens[: self.num_prompt] = request.prompt_ids
        self.order = 0
        self.row = -1
        """Its row in the scheduler's table of blocks; -1 where it holds none."""
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.num_computed = 0
        """Tokens whose keys and values are in the cache."""
        self.num_named = 0
        """Blocks whose key the cache has been told."""
        self.num_cached = -1
        """Tokens that the prefix cache had when it was admitted first; -1 before."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def num_answer(self) -> int:
        """Tokens of the answer so far."""
        return self.num_tokens - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that the model has not read."""
        return self.num_tokens - self.num_computed

    def append(self, token: int) -> None:
        """Add a token to the answer."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1

    def key(self, index: int, block_size: int) -> bytes:
        """Return the key of a whole block of its tokens."""
        while len(self.keys) <= index:
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else b""
            self.keys.append(key_of(parent, self.tokens[start : start + block_size]))
        return self.keys[index]


def first_wanted_row(sequence: Sequence, start: int, stop: int) -> int:
    """Return the first position in [start, stop) whose logits are wanted, all after it are too; `stop` for none."""
    first = stop - 1 if stop == sequence.num_tokens else stop
    known = sequence.prompt_logprobs
    if known is not None and len(known) < sequence.num_prompt:
        # The token at place k is foretold by the row before it.
        first = max(start, min(len(known) - 1, stop))
    return first
