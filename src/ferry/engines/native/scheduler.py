"""Which tokens the model reads in the next step. Continuous batching under a budget of tokens and of blocks.

Sequences that only want their next token come first, then prompts in pieces, oldest first, then those that wait, in
the order they came. A sequence is admitted when all of its tokens find blocks; an answer takes further blocks as it
grows. Where there are none the youngest gives up its own and will be read again. The oldest always goes on, and fits
alone, because what cannot fit is refused when it is added: so there is no deadlock.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from ferry.core.errors import InputError
from ferry.engines.native.blocks import Blocks, Int32
from ferry.engines.native.executor import Batch
from ferry.engines.native.sequence import Sequence, first_wanted_row
from ferry.engines.request import Request

MAX_PROMPT_ROWS = 128
"""Rows of logits in a step for probabilities of prompts: each is as wide as the vocabulary."""


@dataclass(slots=True)
class Step:
    """What one step reads: so many tokens of each sequence, and from which of them on logits are wanted."""

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)
    """Rows of logits of each sequence: its last ones of this step."""


class Scheduler:
    """The queue, the running sequences and the blocks they hold."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        assert num_blocks * block_size >= max_model_len, "the longest answer would find no room"
        self.blocks = Blocks(num_blocks)
        self.block_size = block_size
        self.max_model_len = max_model_len
        # At least one token a step is left for prompts while not all that run are answers.
        self.max_num_seqs = max(1, min(max_num_seqs, max_num_batched_tokens))
        self.max_num_batched_tokens = max(1, max_num_batched_tokens)
        self.prefix_caching = prefix_caching
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._next_order = 0
        width = min(num_blocks, -(-max_model_len // block_size))
        self._tables: Int32 = np.zeros((self.max_num_seqs, width), np.int32)
        self._rows = list(range(self.max_num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """Whether a step would read anything."""
        return bool(self.running or self.waiting)

    def check(self, request: Request) -> None:
        """Refuse a request that could never be answered."""
        num_prompt = len(request.prompt_ids)
        if not num_prompt:
            raise InputError("the prompt has no tokens", code="engine.empty-prompt")
        if num_prompt > self.max_model_len or (num_prompt == self.max_model_len and request.sampling.max_tokens):
            raise InputError(
                f"the prompt has {num_prompt} tokens; prompt and answer together may have {self.max_model_len}",
                code="engine.too-long",
                repair="shorten the prompt, or serve with a larger --max-model-len",
            )

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        sequence.order = self._next_order
        self._next_order += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.row >= 0:
            self._let_go(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> Step:
        """Decide the next step and give its tokens their blocks."""
        step = Step()
        left = self.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        for sequence in list(self.running):
            if sequence.row >= 0 and sequence.num_left == 1 and self._grow(sequence):
                self._read(step, sequence, 1)
        left -= len(step.sequences)
        for sequence in self.running:
            if left and sequence.num_left > 1:
                left -= self._read(step, sequence, left)
        if self.num_preemptions == num_preemptions:
            self._admit(step, left)
        return step

    def batch(self, step: Step) -> Batch:
        """Return a step as arrays."""
        sequences = step.sequences
        counts_B = np.array(step.counts, np.int32)
        contexts_B = np.array([sequence.num_computed for sequence in sequences], np.int32) + counts_B
        starts_B1 = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(counts_B, out=starts_B1[1:])
        num_blocks = -(-int(contexts_B.max()) // self.block_size)
        tables_BM = self._tables[[sequence.row for sequence in sequences], :num_blocks]
        tables_BM[np.arange(num_blocks, dtype=np.int32) * self.block_size >= contexts_B[:, None]] = 0
        positions_T = np.arange(starts_B1[-1], dtype=np.int32)
        positions_T += np.repeat(contexts_B - starts_B1[1:], counts_B)
        sequence_T = np.repeat(np.arange(len(sequences), dtype=np.int32), counts_B)
        slots_T = tables_BM[sequence_T, positions_T // self.block_size]
        slots_T *= self.block_size
        slots_T += positions_T % self.block_size
        pieces = [s.tokens[s.num_computed : s.num_computed + n] for s, n in zip(sequences, step.counts, strict=True)]
        if len(sequences) == starts_B1[-1] and step.num_rows.count(1) == len(sequences):
            rows_R = np.arange(len(sequences), dtype=np.int32)
        else:
            ends = zip(starts_B1[1:].tolist(), step.num_rows, strict=True)
            rows_R = np.concatenate([np.arange(end - rows, end, dtype=np.int32) for end, rows in ends])
        return Batch(np.concatenate(pieces), positions_T, slots_T, starts_B1, contexts_B, tables_BM, rows_R)

    def done(self, step: Step) -> None:
        """Note that a step's tokens are in the cache now."""
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            sequence.num_computed += count
            if self.prefix_caching:
                for index in range(sequence.num_named, sequence.num_computed // self.block_size):
                    self.blocks.name(sequence.blocks[index], sequence.key(index, self.block_size))
                    sequence.num_named = index + 1

    def _read(self, step: Step, sequence: Sequence, most: int) -> int:
        """Let a step read up to so many tokens of a sequence, and return how many."""
        count = min(sequence.num_left, most)
        start = sequence.num_computed
        num_rows = start + count - first_wanted_row(sequence, start, start + count)
        if num_rows > 1:
            room = MAX_PROMPT_ROWS - sum(rows for rows in step.num_rows if rows > 1)
            count = min(count, room)
            if count <= 0:
                return 0
            num_rows = start + count - first_wanted_row(sequence, start, start + count)
        step.sequences.append(sequence)
        step.counts.append(count)
        step.num_rows.append(num_rows)
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence a block for its next token, from the youngest if need be; False where it was that itself."""
        if sequence.num_computed < len(sequence.blocks) * self.block_size:
            return True
        while not self.blocks.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._hold(sequence, self.blocks.take(1))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._let_go(sequence)
        sequence.num_computed = sequence.num_named = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, step: Step, left: int) -> None:
        """Admit what waits, in order, as long as there is room of every kind."""
        soon = self._soon_known() if self.prefix_caching and self.waiting else set()
        while self.waiting and left and self._rows:
            sequence = self.waiting[0]
            found = self._known_blocks(sequence)
            index = len(found)
            # What another sequence is about to compute is waited for rather than computed twice.
            if soon and self._may_be_found(sequence, index) and sequence.key(index, self.block_size) in soon:
                return
            num_new = -(-sequence.num_tokens // self.block_size) - index
            num_free = self.blocks.num_free - self.blocks.num_kept(found)
            if num_new > num_free or (self.running and num_new + len(self.running) > num_free):
                return
            self.waiting.popleft()
            self.blocks.share(found)
            sequence.row = self._rows.pop()
            self._hold(sequence, found)
            self._hold(sequence, self.blocks.take(num_new))
            sequence.num_computed = index * self.block_size
            sequence.num_named = index
            insort(self.running, sequence, key=lambda running: running.order)
            if sequence.num_cached < 0:
                sequence.num_cached = sequence.num_computed
                self.num_queried_tokens += sequence.num_prompt
                self.num_hit_tokens += sequence.num_computed
            left -= self._read(step, sequence, left)
            if self.prefix_caching:
                soon |= self._unnamed(sequence)

    def _may_be_found(self, sequence: Sequence, index: int) -> bool:
        """Whether a block of a sequence may come from the cache. Its last token is always read: it foretells."""
        is_whole_before_last = (index + 1) * self.block_size < sequence.num_tokens
        known = sequence.prompt_logprobs
        is_owed_logprobs = known is not None and len(known) < sequence.num_prompt
        return self.prefix_caching and is_whole_before_last and not is_owed_logprobs

    def _known_blocks(self, sequence: Sequence) -> list[int]:
        """Return the blocks at the beginning of a sequence that the cache has."""
        found: list[int] = []
        while self._may_be_found(sequence, len(found)):
            block = self.blocks.find(sequence.key(len(found), self.block_size))
            if block is None:
                break
            found.append(block)
        return found

    def _soon_known(self) -> set[bytes]:
        return {key for sequence in self.running if sequence.num_left > 1 for key in self._unnamed(sequence)}

    def _unnamed(self, sequence: Sequence) -> set[bytes]:
        """Return the keys of whole blocks that a sequence holds and has yet to compute."""
        wholes = range(sequence.num_named, sequence.num_tokens // self.block_size)
        return {sequence.key(index, self.block_size) for index in wholes}

    def _hold(self, sequence: Sequence, blocks: list[int]) -> None:
        start = len(sequence.blocks)
        sequence.blocks += blocks
        self._tables[sequence.row, start : len(sequence.blocks)] = blocks

    def _let_go(self, sequence: Sequence) -> None:
        self.blocks.give_back(sequence.blocks)
        sequence.blocks = []
        self._rows.append(sequence.row)
        sequence.row = -1
