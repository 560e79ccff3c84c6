"""Which tokens a step computes: a pure function of (data, seed, step, layout), with no state to save or replay.

The samples of a step do not depend on the layout; how they are packed into rows does. The loss is a mean over all
supervised tokens of the step, so packing, micro-batches and ranks change no number but its last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ferry.data.vision.pictures import Picture

Ints = npt.NDArray[np.int64]
NO_LABEL = -1
LENGTH_STEP = 64
"""Rows of a pipeline are padded to a multiple of this, so that few shapes are seen."""
MAX_POSITIONS = 1 << 20


class Sample(NamedTuple):
    """Tokens of one sample or one sequence; `starts` are where documents begin in it (always 0 first)."""

    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    starts: Ints
    pictures: tuple[Picture, ...] = ()


class SampleSource(Protocol):
    """An endless row of samples in a fixed order, by their number."""

    def get(self, number: int) -> Sample: ...

    def epoch_of(self, number: int) -> float: ...


@dataclass(frozen=True)
class Packing:
    """How samples become rows. `capacity` is tokens a row, `uniform` gives all rows of a rank one length."""

    global_batch: int
    capacity: int
    dp: int
    min_rows: int = 1
    multiple: int = 1
    """Rows a rank are a multiple of this: interleaved pipelines want one of their stages."""
    uniform: bool = False
    packing: bool = True

    def num_rows(self, wanted: int) -> int:
        """Return how many rows a rank gets where so many are wanted."""
        return -(-max(self.min_rows, wanted) // self.multiple) * self.multiple


class Micro(NamedTuple):
    """One row: token ids, positions that restart with each segment, labels (NO_LABEL = none), dropout identities."""

    ids_T: Ints
    positions_T: Ints
    labels_T: Ints
    token_ids_T: Ints
    pictures: tuple[Picture, ...] = ()

    @property
    def arrays(self) -> tuple[Ints, Ints, Ints, Ints]:
        return self[:4]


class StepBatch(NamedTuple):
    """The rows of one data-parallel rank, and counts over all ranks."""

    rows: list[Micro]
    num_tokens: int
    num_supervised: int
    num_padding: int
    num_samples: int
    first_sample: int
    epoch: float


def step_batch(source: SampleSource, packing: Packing, step: int, dp_rank: int) -> StepBatch:
    """Return the rows of step `step` (counted from 0) for one data-parallel rank."""
    first = step * packing.global_batch
    numbers = range(first, first + packing.global_batch)
    samples = [source.get(number) for number in numbers]
    return pack(samples, packing, dp_rank, first, source.epoch_of(first + packing.global_batch))


def pack(samples: list[Sample], packing: Packing, dp_rank: int, first: int, epoch: float) -> StepBatch:
    """Return the rows of one rank for some samples, the first of which has the number `first`."""
    lengths = [len(sample.tokens) for sample in samples]
    bins = fill_rows(lengths, packing)
    per_rank = len(bins) // packing.dp
    built = [bins[rank * per_rank : (rank + 1) * per_rank] for rank in range(packing.dp)]
    row_lengths = [_rounded(max(_row_length(row, lengths) for row in rows)) if packing.uniform else 0 for rows in built]
    rows = [_micro(row, samples, first, row_lengths[dp_rank]) for row in built[dp_rank]]
    padded = sum(max(row_lengths[rank], _row_length(row, lengths)) for rank, rows_ in enumerate(built) for row in rows_)
    num_tokens = sum(lengths)
    num_supervised = sum(int(_has_label(sample).sum()) for sample in samples)
    return StepBatch(rows, num_tokens, num_supervised, padded - num_tokens, len(samples), first, epoch)


def fill_rows(lengths: list[int], packing: Packing) -> list[list[int]]:
    """Return which samples lie in which row: an equal number of rows for every rank, about equally long.

    The longest sample goes first, into the row that is emptiest (longest processing time first, Graham 1969); if one
    does not fit, every rank gets a row more.
    """
    if not packing.packing:
        per_rank = packing.num_rows(-(-len(lengths) // packing.dp))
        rows: list[list[int]] = [[] for _ in range(per_rank * packing.dp)]
        for number in range(len(lengths)):
            rows[number % packing.dp * per_rank + number // packing.dp].append(number)
        return rows
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    per_rank = packing.num_rows(-(-sum(lengths) // (packing.capacity * packing.dp)))
    while True:
        rows = [[] for _ in range(per_rank * packing.dp)]
        filled = [0] * len(rows)
        for number in order:
            row = min(range(len(rows)), key=lambda index: (filled[index], index))
            rows[row].append(number)
            filled[row] += lengths[number]
        if max(filled) <= packing.capacity or per_rank >= len(lengths):
            return [sorted(row) for row in rows]
        per_rank = packing.num_rows(per_rank + 1)


def _rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _row_length(row: list[int], lengths: list[int]) -> int:
    """Return the tokens of a row; an empty one still has one, of padding."""
    total = sum(lengths[number] for number in row)
    return max(1, total)


def _has_label(sample: Sample) -> npt.NDArray[np.bool_]:
    """Say which positions predict a supervised token: the next one, if it belongs to the same document."""
    mask = np.zeros(len(sample.tokens), np.bool_)
    mask[:-1] = sample.supervised[1:]
    inner = sample.starts[sample.starts > 0]
    mask[inner - 1] = False
    return mask


def _micro(row: list[int], samples: list[Sample], first: int, length: int) -> Micro:
    """Join samples into a row and pad it to `length` (if that is longer); padding is a segment of its own."""
    total = sum(len(samples[number].tokens) for number in row)
    length = max(1, total, length)
    ids, labels = np.zeros(length, np.int64), np.full(length, NO_LABEL, np.int64)
    positions, token_ids = np.arange(length, dtype=np.int64), np.zeros(length, np.int64)
    at = 0
    for number in row:
        sample = samples[number]
        end = at + len(sample.tokens)
        ids[at:end] = sample.tokens
        predicted = _has_label(sample).nonzero()[0]
        labels[at + predicted] = sample.tokens[predicted + 1]
        bounds = [*sample.starts.tolist(), len(sample.tokens)]
        for start, stop in pairwise(bounds):
            positions[at + start : at + stop] = np.arange(stop - start)
        token_ids[at:end] = (first + number) * MAX_POSITIONS + np.arange(end - at)
        at = end
    positions[at:] = np.arange(length - at)
    pictures = tuple(picture for number in row for picture in samples[number].pictures)
    return Micro(ids, positions, labels, token_ids, pictures)
