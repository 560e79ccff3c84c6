"""The crossing: every canonical tensor is read from its pieces, hashed, and written to its pieces, a window at a time.

A window is a run of whole rows of one canonical tensor in one small buffer. It is gathered from the source slots,
compared with every further copy of the same bytes, hashed in canonical order, changed if the family declares a change,
and scattered to the target slots, whose CRC-32 is put together from the windows. Memory does not grow with the model:
it is threads x (window + scratch). The same loop converts either way, re-shards, and (without targets) verifies.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.core.crc32 import combine, crc32, of_zeros
from ferry.core.dtypes import ITEM_BYTES
from ferry.core.errors import IntegrityError
from ferry.core.layout import Piece, Slot
from ferry.core.progress import Reporter
from ferry.core.writeback import Writeback

WINDOW_BYTES = 1 << 20
Bytes2D = npt.NDArray[np.uint8]
Transform = Callable[[Bytes2D, str], Bytes2D]
"""Changes a window of whole rows: (rows x row bytes, dtype) -> the same shape."""


class Spec(NamedTuple):
    """A canonical tensor as the carrier sees it: rows of `cols` items."""

    dtype: str
    rows: int
    cols: int


@dataclass(frozen=True)
class TargetFile:
    """A file to be made: its slots, how its frame is written, and how it is closed with the CRC-32 of every slot."""

    path: Path
    num_bytes: int
    slots: tuple[Slot, ...]
    begin: Callable[[int], None]
    finish: Callable[[int, list[int]], None] | None = None
    """Takes the file descriptor and one CRC per slot; None where the format has no CRCs."""


class _Place(NamedTuple):
    """A piece of a canonical tensor in an open file."""

    fd: int
    slot: Slot
    piece: Piece
    segments: list[tuple[int, int, int]] | None
    """Where (offset, bytes, crc) of what was written are noted; None where no CRC is wanted."""
    writeback: Writeback | None = None


@dataclass
class _Journey:
    """All that one tensor needs."""

    spec: Spec
    primary: list[_Place] = field(default_factory=list)
    copies: list[_Place] = field(default_factory=list)
    targets: list[_Place] = field(default_factory=list)


def carry(
    specs: Mapping[str, Spec],
    sources: Sequence[Slot],
    targets: Sequence[TargetFile],
    *,
    reporter: Reporter,
    digests: bool = True,
    transforms: Mapping[str, Transform] | None = None,
    threads: int = 2,
) -> dict[str, str]:
    """Move every tensor of `specs` and return its sha256 by name ("" if `digests` is false).

    The digest is of what was read; where a transform applies, `name` has the digest of what was written and
    `name (source)` that of what was read. Raises IntegrityError where copies of the same bytes differ.
    """
    transforms = transforms or {}
    with ExitStack() as stack:
        journeys = {name: _Journey(spec) for name, spec in specs.items()}
        _place_sources(journeys, sources, stack)
        writeback = Writeback()
        closers = [_open_target(journeys, file, stack, writeback) for file in targets]
        results: dict[str, str] = {}
        stop = threading.Event()

        def run(name: str) -> None:
            if not stop.is_set():
                worker = _Worker(journeys[name], name, transforms.get(name), digests, reporter, stop)
                results.update(worker.run())

        with ThreadPoolExecutor(max(1, min(threads, os.cpu_count() or 1))) as pool:
            futures = [pool.submit(run, name) for name in sorted(journeys, key=lambda name: _where(journeys[name]))]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                stop.set()
            try:
                wait(futures)
            except BaseException:
                stop.set()
                raise
        for future in futures:
            future.result()
        for close in closers:
            close()
    return results


def _where(journey: _Journey) -> tuple[str, int]:
    first = journey.primary[0].slot
    return str(first.path), first.offset


def _place_sources(journeys: dict[str, _Journey], sources: Sequence[Slot], stack: ExitStack) -> None:
    fds: dict[Path, int] = {}
    seen: set[tuple[Any, ...]] = set()
    for slot in sources:
        if slot.path not in fds:
            fds[slot.path] = os.open(slot.path, os.O_RDONLY)
            stack.callback(os.close, fds[slot.path])
        for piece in slot.local.pieces:
            place = _Place(fds[slot.path], slot, piece, None)
            key = piece[:5]
            journey = journeys[piece.name]
            (journey.copies if key in seen else journey.primary).append(place)
            seen.add(key)
    for name, journey in journeys.items():
        covered = sum(place.piece.rows * place.piece.cols for place in journey.primary)
        assert covered == journey.spec.rows * journey.spec.cols, f"{name}: {covered} of {journey.spec} covered"


def _open_target(
    journeys: dict[str, _Journey], file: TargetFile, stack: ExitStack, writeback: Writeback
) -> Callable[[], None]:
    file.path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    stack.callback(os.close, fd)
    os.ftruncate(fd, file.num_bytes)
    file.begin(fd)
    notes: list[list[tuple[int, int, int]]] = [[] for _ in file.slots]
    for slot, segments in zip(file.slots, notes, strict=True):
        for piece in slot.local.pieces:
            place = _Place(fd, slot, piece, segments if file.finish else None, writeback)
            journeys[piece.name].targets.append(place)

    def close() -> None:
        if file.finish is not None:
            file.finish(fd, [_slot_crc(fd, slot, notes[index]) for index, slot in enumerate(file.slots)])

    return close


def _slot_crc(fd: int, slot: Slot, segments: list[tuple[int, int, int]]) -> int:
    """Return a slot's CRC-32 from its segments in order, or by reading it again where it was written in strips."""
    row_bytes = slot.local.cols * ITEM_BYTES[slot.dtype]
    end = slot.offset + slot.local.rows * row_bytes
    pad_bytes = slot.local.pad_rows * row_bytes
    position, parts = slot.offset, []
    for offset, size, crc in sorted(segments):
        if offset != position:
            break
        parts.append((crc, size))
        position += size
    if position == end - pad_bytes:
        return combine([*parts, (of_zeros(pad_bytes), pad_bytes)] if pad_bytes else parts)
    total, position = 0, slot.offset
    while position < end:
        data = os.pread(fd, min(WINDOW_BYTES, end - position), position)
        total, position = crc32(data, total), position + len(data)
    return total


class _Worker:
    """Carries one tensor. Holds its buffers."""

    def __init__(
        self,
        journey: _Journey,
        name: str,
        transform: Transform | None,
        digests: bool,
        reporter: Reporter,
        stop: threading.Event,
    ) -> None:
        self.journey, self.name, self.transform = journey, name, transform
        self.digests, self.reporter, self.stop = digests, reporter, stop
        self.item = ITEM_BYTES[journey.spec.dtype]
        self.row_bytes = journey.spec.cols * self.item
        # Strips of a transposed piece are as long as the window is high: a higher window makes fewer of them.
        strips = any(place.piece.transposed for place in (*journey.primary, *journey.targets))
        window = WINDOW_BYTES * (8 if strips else 1)
        self.window_rows = max(1, min(journey.spec.rows, window // max(1, self.row_bytes)))

    def run(self) -> dict[str, str]:
        rows, before, after = self.journey.spec.rows, hashlib.sha256(), hashlib.sha256()
        buffer = np.empty((self.window_rows, self.row_bytes), np.uint8)
        for row in range(0, rows, self.window_rows):
            if self.stop.is_set():
                break
            window = buffer[: min(self.window_rows, rows - row)]
            for place in self.journey.primary:
                self._gather(place, window, row)
            for place in self.journey.copies:
                self._compare(place, window, row)
            if self.digests:
                before.update(window.data.cast("B"))
            if self.transform is not None:
                window = self.transform(window, self.journey.spec.dtype)
                if self.digests:
                    after.update(window.data.cast("B"))
            for place in self.journey.targets:
                self._scatter(place, window, row)
            self.reporter.advance(window.nbytes)
        if not self.digests:
            return {self.name: ""}
        if self.transform is None:
            return {self.name: before.hexdigest()}
        return {self.name: after.hexdigest(), f"{self.name} (source)": before.hexdigest()}

    def _overlap(self, piece: Piece, row: int, count: int) -> tuple[int, int]:
        """Return the rows of the canonical tensor that both the piece and the window hold."""
        return max(piece.row, row), min(piece.row + piece.rows, row + count)

    def _gather(self, place: _Place, window: Bytes2D, row: int) -> None:
        piece, item = place.piece, self.item
        start, end = self._overlap(piece, row, len(window))
        if start >= end:
            return
        part = window[start - row : end - row, piece.col * item : (piece.col + piece.cols) * item]
        if piece.transposed:
            self._gather_transposed(place, part, start, end)
            return
        local_bytes = place.slot.local.cols * item
        offset = place.slot.offset + (piece.at_row + start - piece.row) * local_bytes
        if local_bytes == part.shape[1] and part.flags.c_contiguous:
            _read(place.fd, part.data.cast("B"), offset, place.slot)
            return
        if local_bytes == part.shape[1]:
            scratch = np.empty((end - start, local_bytes), np.uint8)
            _read(place.fd, scratch.data.cast("B"), offset, place.slot)
            part[:] = scratch
            return
        self._gather_strips(place, part, offset + piece.at_col * item, local_bytes)

    def _gather_strips(self, place: _Place, part: Bytes2D, offset: int, local_bytes: int) -> None:
        """Read a rectangle that is narrower than its slot: all rows at once where little is wasted, else row by row."""
        height, width = part.shape
        if height * local_bytes <= 4 * WINDOW_BYTES:
            scratch = np.empty(height * local_bytes, np.uint8)
            span = scratch[: (height - 1) * local_bytes + width]
            _read(place.fd, span.data, offset, place.slot)
            part[:] = scratch.reshape(height, local_bytes)[:, :width]
            return
        strip = np.empty(width, np.uint8)
        for index in range(height):
            _read(place.fd, strip.data, offset + index * local_bytes, place.slot)
            part[index] = strip

    def _gather_transposed(self, place: _Place, part: Bytes2D, start: int, end: int) -> None:
        piece, item, local_cols = place.piece, self.item, place.slot.local.cols
        turned = np.empty((piece.cols, (end - start) * item), np.uint8)
        first = piece.at_row * local_cols + piece.at_col + start - piece.row
        for index in range(piece.cols):
            offset = place.slot.offset + (first + index * local_cols) * item
            _read(place.fd, turned[index].data, offset, place.slot)
        part[:] = _turn(turned, item)

    def _compare(self, place: _Place, window: Bytes2D, row: int) -> None:
        start, end = self._overlap(place.piece, row, len(window))
        if start >= end:
            return
        other = np.empty_like(window)
        self._gather(place, other, row)
        left, right = place.piece.col * self.item, (place.piece.col + place.piece.cols) * self.item
        rows = slice(start - row, end - row)
        if not np.array_equal(window[rows, left:right], other[rows, left:right]):
            raise IntegrityError(
                f"{place.slot.label} in {place.slot.path} differs from the other copy of {self.name}",
                code="carry.copies-differ",
                repair="a file is damaged, or the run that wrote it kept its copies apart; `ferry verify` tells more",
            )

    def _scatter(self, place: _Place, window: Bytes2D, row: int) -> None:
        piece, item = place.piece, self.item
        start, end = self._overlap(piece, row, len(window))
        if start >= end:
            return
        part = window[start - row : end - row, piece.col * item : (piece.col + piece.cols) * item]
        local_bytes = place.slot.local.cols * item
        if piece.transposed:
            turned = _turn(part, item)
            first = piece.at_row * place.slot.local.cols + piece.at_col + start - piece.row
            _write_strips(place, turned, place.slot.offset + first * item, local_bytes)
            return
        offset = place.slot.offset + (piece.at_row + start - piece.row) * local_bytes + piece.at_col * item
        if part.shape[1] != local_bytes:
            _write_strips(place, np.ascontiguousarray(part), offset, local_bytes)
            return
        data = np.ascontiguousarray(part).data.cast("B")
        _write(place, data, offset)
        if place.segments is not None:
            place.segments.append((offset, len(data), crc32(data)))


def _turn(part: Bytes2D, item: int) -> Bytes2D:
    """Exchange rows and columns of items of `item` bytes."""
    items = np.ascontiguousarray(part).view(np.dtype(f"u{item}"))
    return np.ascontiguousarray(items.T).view(np.uint8)


def _write_strips(place: _Place, rows: Bytes2D, offset: int, stride: int) -> None:
    for index in range(len(rows)):
        _write(place, rows[index].data, offset + index * stride)


def _read(fd: int, buffer: memoryview, offset: int, slot: Slot) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise IntegrityError(f"{slot.path} ends inside {slot.label}", code="carry.cut", repair="fetch it again")
        done += count


def _write(place: _Place, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        done += os.pwrite(place.fd, buffer[done:], offset + done)
    if place.writeback is not None:
        place.writeback.wrote(place.fd, len(buffer))
