"""A rank's own tensors, read straight from the slots of any checkpoint: only the rectangles it needs.

The carrier moves whole models between files; this reads one `Local` into memory. Training loads its slices with it from
Hugging Face files, from Megatron shards, and from its own checkpoints of any other layout: all are slots.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ferry.core.dtypes import ITEM_BYTES
from ferry.core.errors import IntegrityError
from ferry.core.layout import Local, Piece, Slot

Items2D = npt.NDArray[np.unsignedinteger]
STRIP_BYTES = 4096
"""Rows of a narrow rectangle are read one by one where a row has at least so many bytes that are not wanted."""


class Sources:
    """Slots by canonical tensor, and their files, opened when first needed. Use as a context manager."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._places: dict[str, list[tuple[Slot, Piece]]] = {}
        self._fds: dict[Path, int] = {}
        self.num_bytes_read = 0
        for slot in slots:
            for piece in slot.local.pieces:
                self._places.setdefault(piece.name, []).append((slot, piece))

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def dtype(self, name: str) -> str:
        """Return the stored dtype of a canonical tensor."""
        return self._places[name][0][0].dtype

    def wholes(self) -> dict[str, Local]:
        """Return, for every canonical tensor there are pieces of, the whole of it: as large as its pieces reach."""
        found = {}
        for name, places in self._places.items():
            rows = max(piece.row + piece.rows for _, piece in places)
            cols = max(piece.col + piece.cols for _, piece in places)
            found[name] = Local(rows, cols, places[0][0].local.ndim, (Piece(name, 0, 0, rows, cols, 0),))
        return found

    def gather(self, local: Local) -> tuple[Items2D, str]:
        """Return (rows x cols items as unsigned integers, dtype); rows that no piece covers are zero.

        Raises IntegrityError where the slots do not hold all that the pieces ask for.
        """
        dtype = self.dtype(local.pieces[0].name) if local.pieces else "F32"
        item = ITEM_BYTES[dtype]
        filled: Items2D = np.zeros((local.rows, local.cols), np.dtype(f"u{item}"))
        for piece in local.pieces:
            if self.dtype(piece.name) != dtype:
                raise IntegrityError(f"{piece.name} is {self.dtype(piece.name)}, not {dtype}", code="gather.dtype")
            window = filled[piece.at_row : piece.at_row + piece.rows, piece.at_col : piece.at_col + piece.cols]
            self._fill(piece, window)
        return filled, dtype

    def _fill(self, wanted: Piece, window: Items2D) -> None:
        """Fill the window of a (not transposed) piece from the first slots that cover it."""
        missing = wanted.rows * wanted.cols
        seen: set[tuple[int, int, int, int]] = set()
        for slot, piece in self._places[wanted.name]:
            top, bottom = max(wanted.row, piece.row), min(wanted.row + wanted.rows, piece.row + piece.rows)
            left, right = max(wanted.col, piece.col), min(wanted.col + wanted.cols, piece.col + piece.cols)
            if top >= bottom or left >= right or (top, bottom, left, right) in seen:
                continue
            seen.add((top, bottom, left, right))
            part = window[top - wanted.row : bottom - wanted.row, left - wanted.col : right - wanted.col]
            part[:] = self._read(slot, piece, top - piece.row, left - piece.col, *part.shape)
            missing -= part.size
            if not missing:
                return
        if missing:
            raise IntegrityError(
                f"{wanted.name}: rows {wanted.row} to {wanted.row + wanted.rows} are not all in the checkpoint",
                code="gather.missing",
            )

    def _read(self, slot: Slot, piece: Piece, row: int, col: int, rows: int, cols: int) -> Items2D:
        """Return a rectangle of a stored piece, given by its place inside the piece."""
        if piece.transposed:
            turned = piece._replace(transposed=False)
            unturned = self._read(slot, turned, col, row, cols, rows)
            return np.transpose(unturned)
        item, width = ITEM_BYTES[slot.dtype], slot.local.cols
        first = slot.offset + ((piece.at_row + row) * width + piece.at_col + col) * item
        kind = np.dtype(f"u{item}")
        if (width - cols) * item < STRIP_BYTES or rows == 1:
            raw = np.empty((rows - 1) * width + cols, kind)
            self._pread(slot, raw, first)
            rectangle: Items2D = np.lib.stride_tricks.as_strided(raw, (rows, cols), (width * item, item))
            return rectangle
        strips = np.empty((rows, cols), kind)
        for index in range(rows):
            self._pread(slot, strips[index], first + index * width * item)
        return strips

    def _pread(self, slot: Slot, into: npt.NDArray[np.unsignedinteger], offset: int) -> None:
        if slot.path not in self._fds:
            self._fds[slot.path] = os.open(slot.path, os.O_RDONLY)
        buffer = into.view(np.uint8).data.cast("B")
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fds[slot.path], [buffer[done:]], offset + done)
            if count == 0:
                raise IntegrityError(
                    f"{slot.path} ends inside {slot.label}", code="gather.cut", repair="fetch it again"
                )
            done += count
        self.num_bytes_read += len(buffer)
