"""Rows to tokens, a chunk at a time, by this process or by workers; in the order of the rows either way.

A worker gets a spec (small, and equal for all chunks) and a chunk, and returns arrays and findings. It raises nothing:
errors come back as values, because an error must reach the user with its code. Tokens do not depend on who made them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.core.errors import FerryError, InputError, UnavailableError
from ferry.data import readers
from ferry.data.conversation import BadRow, Conversation
from ferry.data.handlers import Handler, convert, named_handler
from ferry.data.rendering import RendererSpec, Tokens, renderer
from ferry.data.settings import Truncation
from ferry.data.vision.pictures import Picture
from ferry.data.vision.rows import encoded, is_cut

CHUNK_BYTES = 1 << 18
MAX_CHUNK_ROWS = 2048
BYTES_A_WORKER = 16_000_000
"""A worker costs seconds of imports: below about so much input it costs more than it gives (measured: 0.6 s a MB)."""


class Chunk(NamedTuple):
    """Rows of one file. `handler` is the name of their format."""

    source: str
    handler: str
    places: tuple[str, ...]
    payloads: tuple[Any, ...]
    num_bytes: int
    folder: str = ""
    """Where relative paths in the rows begin."""


class Spec(NamedTuple):
    """What is done to each row. `max_len` is None where samples may have any length."""

    rendering: RendererSpec
    max_len: int | None
    truncation: Truncation


class Finding(NamedTuple):
    """Something about one row: where, and what."""

    where: str
    what: str


@dataclass
class Done:
    """What became of a chunk."""

    num_rows: int
    num_bytes: int
    ids_T: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    supervised_T: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    lengths: list[int] = field(default_factory=list)
    pictures: list[tuple[Picture, ...]] = field(default_factory=list)
    bad: list[Finding] = field(default_factory=list)
    too_long: list[tuple[int, str]] = field(default_factory=list)
    """Length and place of samples longer than allowed."""
    num_without_target: int = 0
    error: tuple[type[FerryError], str, str, str] | None = None
    """Class, message, code and repair of what ends the whole work."""


def tokenise(chunks: Iterable[Chunk], spec: Spec, num_workers: int) -> Iterator[Done]:
    """Give what becomes of each chunk, in order."""
    results = _by_workers(chunks, spec, num_workers) if num_workers else (work(spec, chunk) for chunk in chunks)
    for done in results:
        if done.error is not None:
            kind, message, code, repair = done.error
            raise kind(message, code=code, repair=repair)
        yield done


def chunked(source: readers.Source, handler: str) -> Iterator[Chunk]:
    """Give the rows of a file in chunks; where they are cut does not depend on the number of workers."""
    rows: list[readers.Row] = []
    num_bytes = 0
    for row in readers.read_rows(source):
        rows.append(row)
        num_bytes += row.num_bytes
        if num_bytes >= CHUNK_BYTES or len(rows) >= MAX_CHUNK_ROWS:
            yield _chunk(source, handler, rows, num_bytes)
            rows, num_bytes = [], 0
    if rows:
        yield _chunk(source, handler, rows, num_bytes)


def derived_workers(num_bytes: int) -> int:
    """Return a number of workers that is worth its start: none for little data."""
    return 0 if num_bytes < 2 * BYTES_A_WORKER else min(os.cpu_count() or 1, num_bytes // BYTES_A_WORKER)


def work(spec: Spec, chunk: Chunk) -> Done:
    """Tokenise one chunk. Runs in a worker or here."""
    samples: list[Tokens] = []
    handler = named_handler(chunk.handler)
    done = Done(num_rows=len(chunk.places), num_bytes=chunk.num_bytes)
    try:
        for row_place, payload in zip(chunk.places, chunk.payloads, strict=True):
            where = f"{chunk.source}{row_place}"
            try:
                sample = _encoded(spec, handler, payload, where, chunk.folder)
            except BadRow as reason:
                done.bad.append(Finding(where, str(reason)))
                continue
            place(sample, where, spec, samples, done)
    except FerryError as error:
        done.error = (type(error), error.message, error.code, error.repair)
    return filled(done, samples)


def place(sample: Tokens, where: str, spec: Spec, samples: list[Tokens], done: Done) -> None:
    """Keep a sample, cut it, or leave it out; count what happens."""
    if spec.max_len is not None and len(sample.ids_T) > spec.max_len:
        done.too_long.append((len(sample.ids_T), where))
        if spec.truncation != "cut" or is_cut(sample, spec.max_len, spec.rendering.vision):
            return
        sample = Tokens(sample.ids_T[: spec.max_len], sample.supervised_T[: spec.max_len], sample.pictures)
    # The first token of a sample follows nothing: it cannot be learned.
    if not sample.supervised_T[1:].any():
        done.num_without_target += 1
        return
    samples.append(sample)


def filled(done: Done, samples: Sequence[Tokens]) -> Done:
    """Return the chunk with the samples that were kept."""
    if samples:
        done.ids_T = np.concatenate([sample.ids_T for sample in samples])
        done.supervised_T = np.concatenate([sample.supervised_T for sample in samples])
        done.lengths = [len(sample.ids_T) for sample in samples]
        done.pictures = [sample.pictures for sample in samples]
    return done


def _encoded(spec: Spec, handler: Handler, payload: Any, where: str, folder: str) -> Tokens:
    meaning, vision = convert(handler, readers.parse(payload)), spec.rendering.vision
    if isinstance(meaning, Conversation) and vision is not None:
        return encoded(renderer(spec.rendering), meaning, folder, vision)
    if isinstance(meaning, Conversation) and meaning.images:
        raise InputError(
            f"{where} has pictures, which only sft and lora of a vision-language model can use",
            code="data.images",
            repair="train a vision-language model, or take the pictures out",
        )
    return renderer(spec.rendering).encode(meaning)


def _chunk(source: readers.Source, handler: str, rows: Sequence[readers.Row], num_bytes: int) -> Chunk:
    places, payloads = tuple(row.place for row in rows), tuple(row.payload for row in rows)
    return Chunk(source.name, handler, places, payloads, num_bytes, str(source.path.parent.absolute()))


def _by_workers(chunks: Iterable[Chunk], spec: Spec, num_workers: int) -> Iterator[Done]:
    waiting: deque[Future[Done]] = deque()
    # spawn: a fork of a process with threads (tokenizers, OpenMP) can stand still for ever.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _calm) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, spec, chunk))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UnavailableError(
                "a worker that tokenises died",
                code="data.worker",
                repair="see its last words above, or set num_workers to 0 to work without",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _calm() -> None:
    """Keep a worker to one thread: there are as many workers as there is room for."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
