"""Megatron's tokenised data, `PREFIX.bin` and `PREFIX.idx`, read and written.

    .bin   the tokens of all sequences behind each other
    .idx   9 bytes `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 number of sequences, uint64 number of
           document indices, then int32 length and int64 byte offset of each sequence, int64 document indices

A document is the sequences between two document indices; the first index is 0. What may follow (one int8 a sequence, of
multimodal data) is not read. Reading maps the files; writing keeps only lengths in memory, and each file appears whole.
"""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferry.core.errors import InputError, OutputError
from ferry.core.staging import sync_directory

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
Items = npt.NDArray[Any]


class IndexedData:
    """Open data: sequences by number, and documents as groups of them."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        idx, bin_ = (Path(f"{prefix}{ending}") for ending in (".idx", ".bin"))
        for path in (idx, bin_):
            if not path.is_file():
                raise InputError(f"{path} is not there", code="megatron-data.missing", repair="give .bin and .idx both")
        self.dtype, num_sequences, num_indices = _header(idx)
        at = len(MAGIC) + HEADER.size
        needed = at + 12 * num_sequences + 8 * num_indices
        if idx.stat().st_size < needed:
            raise _bad(idx, f"has {idx.stat().st_size} bytes, its header promises {needed}")
        self.lengths = _mapped(idx, "<i4", at, num_sequences)
        self._pointers = _mapped(idx, "<i8", at + 4 * num_sequences, num_sequences)
        self.document_indices = _mapped(idx, "<i8", at + 12 * num_sequences, num_indices)
        self._check(idx, bin_.stat().st_size)
        self._items = _mapped(bin_, self.dtype, 0, bin_.stat().st_size // self.dtype.itemsize)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return max(len(self.document_indices) - 1, 0)

    def sequence(self, index: int) -> Items:
        """Return the items of one sequence, mapped."""
        first = int(self._pointers[index]) // self.dtype.itemsize
        return self._items[first : first + int(self.lengths[index])]

    def document(self, index: int) -> Items:
        """Return the items of all sequences of one document."""
        first, last = int(self.document_indices[index]), int(self.document_indices[index + 1])
        if last == first + 1:
            return self.sequence(first)
        return np.concatenate([np.zeros(0, self.dtype), *(self.sequence(number) for number in range(first, last))])

    def _check(self, idx: Path, bin_bytes: int) -> None:
        """Refuse an index that points outside its data, before anything is read."""
        lengths, pointers, indices = (np.asarray(part, np.int64) for part in self._parts())
        ends = pointers + lengths * self.dtype.itemsize
        if len(lengths) and (lengths.min() < 0 or pointers.min() < 0 or int(ends.max()) > bin_bytes):
            raise _bad(idx, f"points outside its .bin of {bin_bytes} bytes")
        if (pointers % self.dtype.itemsize).any():
            raise _bad(idx, f"has offsets that are no multiple of {self.dtype.itemsize} bytes")
        if not len(indices) or indices[0] != 0 or indices[-1] != len(lengths) or (np.diff(indices) < 0).any():
            raise _bad(idx, f"has document indices that do not go from 0 to its {len(lengths)} sequences")

    def _parts(self) -> tuple[Items, Items, Items]:
        return self.lengths, self._pointers, self.document_indices


class IndexedWriter:
    """Writes data. Use as a context manager: at its end the files appear, or nothing if it was left by an error."""

    def __init__(self, prefix: Path, dtype: npt.DTypeLike = np.int32) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._paths = [Path(f"{prefix}{ending}") for ending in (".bin", ".idx")]
        self._works = [path.parent / f".{path.name}.ferry-partial" for path in self._paths]
        self._lengths, self._indices = array("i"), array("q", [0])
        if self.dtype not in DTYPES.values():
            raise ValueError(f"{self.dtype} has no code in this format")
        for path in self._paths:
            if path.exists():
                raise OutputError(f"{path} exists already", code="output.exists", repair="choose another, or remove it")
        self._bin = open(self._works[0], "wb")  # noqa: SIM115 - closed by __exit__

    def append(self, sequence_T: Items, *, ends_document: bool = True) -> None:
        """Append one sequence; by default it is a document by itself."""
        items = np.ascontiguousarray(sequence_T)
        stored = items.astype(self.dtype)
        if not np.array_equal(stored, items):
            raise ValueError(f"a value does not fit {self.dtype}")
        self._bin.write(stored.tobytes())
        self._lengths.append(len(stored))
        if ends_document:
            self._indices.append(len(self._lengths))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.close()
            for work in self._works:
                work.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._indices[-1] != len(self._lengths):
            self._indices.append(len(self._lengths))
        lengths = np.asarray(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with open(self._works[1], "wb") as idx:
            idx.write(MAGIC + HEADER.pack(VERSION, code, len(lengths), len(self._indices)))
            for part, kind in ((lengths, "<i4"), (pointers, "<i8"), (np.asarray(self._indices, np.int64), "<i8")):
                idx.write(part.astype(kind).tobytes())
            idx.flush()
            os.fsync(idx.fileno())
        self._bin.flush()
        os.fsync(self._bin.fileno())
        for work, path in zip(self._works, self._paths, strict=True):
            os.rename(work, path)  # .bin first: an .idx never stands without its data
        sync_directory(self._paths[0].parent)


def _header(idx: Path) -> tuple[np.dtype[Any], int, int]:
    with open(idx, "rb") as file:
        start = file.read(len(MAGIC) + HEADER.size)
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + HEADER.size:
        raise _bad(idx, "does not begin like an index of Megatron data (MMIDIDX)")
    version, code, num_sequences, num_indices = HEADER.unpack_from(start, len(MAGIC))
    if version != VERSION:
        raise _bad(idx, f"has version {version}, expected {VERSION}")
    if code not in DTYPES:
        raise _bad(idx, f"has the unknown dtype code {code}, expected 1 to {max(DTYPES)}")
    return DTYPES[code], num_sequences, num_indices


def _mapped(path: Path, dtype: npt.DTypeLike, offset: int, num: int) -> Items:
    """Return part of a file, mapped; an empty one cannot be."""
    if not num:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(num,))


def _bad(idx: Path, what: str) -> InputError:
    return InputError(f"{idx} {what}", code="megatron-data.index", repair="preprocess the data again")
