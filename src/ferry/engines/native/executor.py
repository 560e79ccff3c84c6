"""One step of a model over many sequences: what goes in, what comes out, and which executor a model gets.

The loop packs the tokens of all sequences into one row and says where their keys and values lie; an executor knows the
model and nothing of requests. `generic.py` runs whatever transformers knows; `fast.py` runs the families it has kernels
for. No torch here: the loop's bookkeeping is numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ferry.engines.engine import EngineSettings

Whole = npt.NDArray[np.int32] | npt.NDArray[np.int64]
DEFAULT_BLOCK_SIZE = 16
"""Tokens in a block of the cache, where nobody says."""


@dataclass(slots=True)
class Batch:
    """One step. T tokens of B sequences, packed; M blocks of the longest table; R rows whose logits are wanted."""

    token_ids_T: Whole
    positions_T: Whole
    """The place of each token in its sequence."""
    slots_T: Whole
    """Where its key and value go: block * block_size + offset."""
    query_starts_B1: Whole
    """Cumulative numbers of tokens, from 0 to T: those of sequence b are [b] to [b + 1]."""
    context_lens_B: Whole
    """Tokens of each sequence after this step."""
    block_tables_BM: Whole
    """The blocks of each sequence in order, padded with 0."""
    logits_rows_R: Whole


class Executor(Protocol):
    """A loaded model with a paged cache of keys and values."""

    num_tokens: int
    """Width of the logits."""
    max_model_len: int
    block_size: int
    dtype: str
    scheme: str
    weights_bytes: int
    block_bytes: int
    """Of one block, all layers together."""
    threads: int
    notes: tuple[str, ...]

    def step_bytes(self, num_tokens: int) -> int:
        """Return about how much memory a step of so many tokens takes beside weights, cache and logits."""
        ...

    def allocate(self, num_blocks: int) -> None:
        """Make the cache. Memory is used as blocks are written."""
        ...

    def forward(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return the logits [R, num_tokens]. They may be overwritten by the next call."""
        ...

    def close(self) -> None:
        """End what runs beside it, and give its memory back: it computes no more."""
        ...


def open_executor(settings: EngineSettings) -> Executor:
    """Load a model; the fast executor where the kernels run it, else the generic one, whose notes say why."""
    from ferry.engines.native.fast import open_fast, why_not

    fast: Executor | None = open_fast(settings)
    if fast is not None:
        return fast
    from ferry.engines.native.generic import open_generic

    return open_generic(settings, note=f"transformers computes it: {why_not(settings)}")
