"""Prepared data as an endless row of samples, in an order that is a function of the seed and the sample's number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ferry.data.mixture import Mixture
from ferry.data.prepare import divide
from ferry.data.stream import Epoch, Stream
from ferry.data.tokenset import TokenSet
from ferry.verbs.train.engine.batches import Sample, SampleSource
from ferry.verbs.train.job import DataPlace, Job

ONE_DOCUMENT = np.zeros(1, np.int64)


class Samples:
    """Conversations: one sample each, in a new order each epoch."""

    def __init__(self, mixture: Mixture, seed: int, *, shuffle: bool) -> None:
        self._mixture, self._seed, self._shuffle = mixture, seed, shuffle
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def get(self, number: int) -> Sample:
        epoch, place = divmod(number, self._mixture.num_samples)
        if epoch != self._epoch:
            self._order = self._order_of(epoch)
            self._epoch = epoch
        found = self._mixture.sample(int(self._order[place]))
        return Sample(found.ids_T, found.supervised_T.astype(np.bool_), ONE_DOCUMENT, found.pictures)

    def epoch_of(self, number: int) -> float:
        return number / self._mixture.num_samples

    def _order_of(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if not self._shuffle:
            return np.arange(self._mixture.num_samples, dtype=np.int64)
        return self._mixture.epoch_order(self._seed, epoch)


class Sequences:
    """Texts: sequences of seq_len tokens cut from all documents of an epoch behind each other."""

    def __init__(self, stream: Stream, seed: int) -> None:
        self._stream, self._seed = stream, seed
        self._number = 0
        self._epoch: Epoch = stream.epoch(seed, 0)
        self.per_epoch = self._epoch.num_sequences  # as many in every epoch: the tokens are the same

    def get(self, number: int) -> Sample:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._number:
            self._number, self._epoch = epoch, self._stream.epoch(self._seed, epoch)
        tokens, supervised, starts = self._epoch.sequence(place)
        return Sample(tokens, supervised.astype(np.bool_), starts)

    def epoch_of(self, number: int) -> float:
        return number / self.per_epoch


def open_sources(job: Job) -> tuple[SampleSource, Mixture | None]:
    """Return the training samples, and the validation samples if there are any."""
    train, validation = _open(job.data)
    if job.config.method == "pretrain":
        return Sequences(Stream(train, job.seq_len), job.config.seed), validation
    return Samples(train, job.config.seed, shuffle=job.config.rows.shuffle), validation


def validation_samples(mixture: Mixture, seq_len: int) -> list[Sample]:
    """Return all validation samples; texts longer than seq_len are cut into pieces of it, pictures never are."""
    found = []
    for number in range(mixture.num_samples):
        tokens, supervised, pictures = mixture.sample(number)
        for start in range(0, len(tokens), seq_len):
            part = slice(start, start + seq_len)
            if len(tokens[part]) > 1:
                own = () if start else pictures
                found.append(Sample(tokens[part], supervised[part].astype(np.bool_), ONE_DOCUMENT, own))
    return found


def _open(data: DataPlace) -> tuple[Mixture, Mixture | None]:
    sets = [TokenSet.open(Path(place)) for place in data.train]
    held_out = [TokenSet.open(Path(place)) for place in data.validation]
    return divide(
        sets, held_out, list(data.weights) if data.weights is not None else None, data.validation_fraction, data.seed
    )
