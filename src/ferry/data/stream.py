"""Pretraining data as one stream: documents behind each other, cut into sequences of equal length.

The documents of an epoch come in the order the set gives for (seed, epoch). A sequence remembers where documents begin
in it, so that attention need not cross them. What is left over at the end of an epoch, less than one sequence, is not
used in that epoch. Nothing is remembered between calls: sequence i is a pure function of (seed, epoch, i).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.core.errors import InputError
from ferry.data.mixture import Mixture
from ferry.data.orders import Int64
from ferry.data.rendering import Bool, Int32


class Sequence(NamedTuple):
    """`starts` are the positions at which a document, or the rest of one, begins; the first is 0."""

    ids_T: Int32
    supervised_T: Bool
    starts: Int64


class Stream:
    """A set of documents seen as sequences of `seq_len` tokens."""

    def __init__(self, documents: Mixture, seq_len: int) -> None:
        self.documents = documents
        self.seq_len = seq_len
        self._lengths = documents.lengths
        self.sha256 = hashlib.sha256(f"{documents.sha256}\tstream\t{seq_len}".encode()).hexdigest()
        if int(self._lengths.sum()) < seq_len:
            raise InputError(
                f"the data has {int(self._lengths.sum())} tokens, less than one sequence of seq_len={seq_len}",
                code="data.too-little",
                repair="give more data or a smaller seq_len",
            )

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """Return the sequences of one epoch. Costs a permutation of the documents; keep it while the epoch lasts."""
        return Epoch(self, self.documents.epoch_order(seed, epoch))

    def sequence(self, seed: int, epoch: int, index: int) -> Sequence:
        """Return sequence `index` of an epoch."""
        return self.epoch(seed, epoch).sequence(index)


class Epoch:
    """The sequences of one epoch, in order."""

    def __init__(self, stream: Stream, order: Int64) -> None:
        self._stream = stream
        self._order = order
        self._ends: npt.NDArray[np.int64] = np.cumsum(stream._lengths[order])
        self.num_sequences = int(self._ends[-1]) // stream.seq_len

    def sequence(self, index: int) -> Sequence:
        """Return one sequence, in time that does not depend on where it lies."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        seq_len = self._stream.seq_len
        first, last = index * seq_len, (index + 1) * seq_len
        position = int(np.searchsorted(self._ends, first, side="right"))
        parts: list[Int32] = []
        starts: list[int] = []
        at = first
        while at < last:
            document = self._stream.documents.sample(int(self._order[position])).ids_T
            begin = int(self._ends[position]) - len(document)
            part = document[at - begin : last - begin]
            if len(part):
                starts.append(at - first)
                parts.append(part)
            at += len(part)
            position += 1
        return Sequence(np.concatenate(parts), np.ones(seq_len, np.bool_), np.asarray(starts, np.int64))
