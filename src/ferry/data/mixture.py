"""Several sets of samples as one, plain or by weights, and parts of a set. Everything is a pure function of the seed.

Plain: an epoch is every sample once, in a new order each epoch. By weights: an epoch has as many samples as all sets
together, and set i gives `weight_i / sum(weights)` of them. Each set is gone through in rounds, each round in a new
order, and the next epoch goes on where the last one stopped: within a round no sample comes twice. The draws of all
sets are then shuffled together. So position p of epoch e is known from (seed, e, p) alone; resume needs no replay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ferry.data.orders import DRAW, SHUFFLE, Int64, permutation
from ferry.data.rendering import Tokens
from ferry.data.tokenset import Samples


class View:
    """Some samples of a set, by their indices."""

    def __init__(self, samples: Samples, indices: Int64) -> None:
        self._samples = samples
        self.indices = np.asarray(indices, np.int64)
        part = hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest()
        self.sha256 = hashlib.sha256(f"{samples.sha256}\t{part}".encode()).hexdigest()

    @property
    def num_samples(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> Int64:
        return self._samples.lengths[self.indices]

    def sample(self, index: int) -> Tokens:
        return self._samples.sample(int(self.indices[index]))


class Mixture:
    """Sets behind each other under one numbering: samples of set 0 first, then of set 1 ..."""

    def __init__(self, sets: Sequence[Samples], weights: Sequence[float] | None = None) -> None:
        assert sets
        assert weights is None or len(weights) == len(sets)
        self.sets = tuple(sets)
        self.weights = tuple(weights) if weights is not None else None
        self._first = np.concatenate([[0], np.cumsum([part.num_samples for part in sets])]).astype(np.int64)
        self.num_samples = int(self._first[-1])
        described = [
            f"{part.sha256}\t{weight}\n" for part, weight in zip(sets, weights or [0.0] * len(sets), strict=True)
        ]
        self.sha256 = hashlib.sha256("".join(described).encode()).hexdigest()

    @property
    def lengths(self) -> Int64:
        """Return the number of tokens of each sample."""
        return np.concatenate([part.lengths for part in self.sets])

    def sample(self, index: int) -> Tokens:
        """Return one sample by its number."""
        part, inner = self.locate(index)
        return self.sets[part].sample(inner)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the set of a sample, and its number there."""
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return part, index - int(self._first[part])

    def epoch_order(self, seed: int, epoch: int) -> Int64:
        """Return the numbers of the samples of an epoch in their order; always `num_samples` of them."""
        if self.weights is None:
            return permutation(self.num_samples, seed, SHUFFLE, epoch)
        draws = [self._draws(part, count, seed, epoch) for part, count in enumerate(self.counts())]
        drawn = np.concatenate(draws)
        return drawn[permutation(len(drawn), seed, SHUFFLE, epoch)]

    def counts(self) -> list[int]:
        """Return how many samples of an epoch each set gives."""
        if self.weights is None:
            return [part.num_samples for part in self.sets]
        shares = np.asarray(self.weights) / sum(self.weights) * self.num_samples
        counts = np.floor(shares).astype(np.int64)
        largest_rests = np.argsort(counts - shares, kind="stable")
        counts[largest_rests[: self.num_samples - int(counts.sum())]] += 1
        return [int(count) for count in counts]

    def _draws(self, part: int, count: int, seed: int, epoch: int) -> Int64:
        """Return draws `epoch * count ...` of the endless rounds through a set."""
        size = self.sets[part].num_samples
        first, last = epoch * count, (epoch + 1) * count
        rounds = range(first // size, -(-last // size))
        order = np.concatenate([np.zeros(0, np.int64), *(permutation(size, seed, DRAW, part, r) for r in rounds)])
        begin = first - rounds.start * size
        return np.asarray(self._first[part] + order[begin : begin + count], np.int64)
