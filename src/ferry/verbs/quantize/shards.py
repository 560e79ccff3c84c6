"""Weight files that grow block by block and can be taken up again: what is in them is known only when it is there.

Which tensors a block becomes is decided while it is quantized, so the header of a file is written last, into room that
was left for it: as much as the longest possible header needs (safetensors allows spaces behind it). Blocks are dealt to
files by their largest possible sizes. All of this follows from the model and the options alone, so a run that was
killed and taken up again writes the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ferry.core.dtypes import ITEM_BYTES, num_bytes
from ferry.core.errors import LayoutError
from ferry.core.floats import Bytes
from ferry.core.manifest import TensorDigest
from ferry.core.safetensors import Header, parse_header
from ferry.core.staging import sync_directory
from ferry.formats.hf_stream import PT_METADATA, SINGLE, index_of
from ferry.formats.quantized_format import Typed

OFFSET = 10**15
"""No offset is longer than this one."""


class Piece(NamedTuple):
    """A tensor to be written: its bytes come in parts, so that no large one has to be held."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterable[Bytes]


class Entry(NamedTuple):
    """A tensor that was written: where (from the beginning of the payload of its file), and its digest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    sha256: str

    @property
    def end(self) -> int:
        return self.offset + num_bytes(self.dtype, self.shape)


class Unit(NamedTuple):
    """A run of tensors written at once: name to dtype and shape.

    `forms` are the sets of tensors it may become, `expected` what it becomes if nothing falls back.
    """

    name: str
    forms: tuple[Mapping[str, Typed], ...]
    expected: Mapping[str, Typed]

    @property
    def max_bytes(self) -> int:
        """Return the size of the largest form of each linear together (forms of one unit add up)."""
        return sum(num_bytes(*typed) for typed in self._largest().values())

    def _largest(self) -> dict[str, Typed]:
        found: dict[str, Typed] = {}
        for form in self.forms:
            for name, typed in form.items():
                if name not in found or num_bytes(*typed) > num_bytes(*found[name]):
                    found[name] = typed
        return found

    def header_items(self) -> dict[str, dict[str, object]]:
        """Return the longest descriptions this unit may add to a header."""
        return {
            name: {"dtype": dtype, "shape": list(shape), "data_offsets": [OFFSET, OFFSET]}
            for name, (dtype, shape) in self._largest().items()
        }


def sorted_for_alignment(pieces: Iterable[Piece], start: int) -> list[Piece]:
    """Return pieces so that each begins at a multiple of its items, where the first begins at `start`.

    Wide items come first; where they cannot, because an odd number of narrow ones lies before them, a piece that mends
    that does (the one scale of a weight in bfloat16: a layer often has seven).
    """
    left = sorted(pieces, key=lambda piece: -ITEM_BYTES[piece.dtype])
    found: list[Piece] = []
    while left:
        width = ITEM_BYTES[left[0].dtype]
        mends = (
            number
            for number, piece in enumerate(left)
            if not start % ITEM_BYTES[piece.dtype] and not (start + num_bytes(piece.dtype, piece.shape)) % width
        )
        found.append(left.pop(next(mends, 0) if start % width else 0))
        start += num_bytes(found[-1].dtype, found[-1].shape)
    return found


class Shards:
    """The weight files of a directory while they grow."""

    def __init__(self, directory: Path, units: Sequence[Unit], max_shard_bytes: int) -> None:
        self.directory, self.units = directory, units
        self.file_of: list[int] = []
        filled = 0
        for unit in units:
            begins = not self.file_of or (filled and filled + unit.max_bytes > max_shard_bytes)
            self.file_of.append((self.file_of[-1] + 1 if self.file_of else 0) if begins else self.file_of[-1])
            filled = unit.max_bytes if begins else filled + unit.max_bytes
        total = self.file_of[-1] + 1
        self.names = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
        if total == 1:
            self.names = [SINGLE]
        self.head_bytes = [self._room(file) for file in range(total)]
        self.ends = [0] * total

    def _room(self, file: int) -> int:
        """Return the bytes before the payload of a file."""
        items: dict[str, object] = {"__metadata__": PT_METADATA}
        for unit, own in zip(self.units, self.file_of, strict=True):
            if own == file:
                items |= unit.header_items()
        length = len(json.dumps(items, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + length + -length % 8

    def expected_bytes(self) -> dict[str, int]:
        """Return the size of each file if nothing falls back."""
        sizes = dict(zip(self.names, self.head_bytes, strict=True))
        for unit, file in zip(self.units, self.file_of, strict=True):
            sizes[self.names[file]] += sum(num_bytes(*typed) for typed in unit.expected.values())
        return sizes

    def path(self, file: int) -> Path:
        return self.directory / self.names[file]

    def hold(self, entries: Iterable[Entry]) -> bool:
        """Say whether the files are as long as these tensors need: someone may have removed them."""
        return all(
            self.path(entry.file).is_file()
            and self.path(entry.file).stat().st_size >= self.head_bytes[entry.file] + entry.end
            for entry in entries
        )

    def take_up(self, entries: Iterable[Entry]) -> None:
        """Go on behind the tensors that were written before; whatever else is in the files is cut off."""
        for entry in entries:
            self.ends[entry.file] = max(self.ends[entry.file], entry.end)
        for file, end in enumerate(self.ends):
            if self.path(file).exists():
                os.truncate(self.path(file), self.head_bytes[file] + end if end else 0)

    def write(self, number: int, pieces: Iterable[Piece]) -> list[Entry]:
        """Append the tensors of a unit to its file, and see them on the disk."""
        file = self.file_of[number]
        entries = []
        is_new = not self.path(file).exists()
        with open(self.path(file), "w+b" if is_new else "r+b") as target:
            target.seek(self.head_bytes[file] + self.ends[file])
            for piece in sorted_for_alignment(pieces, self.ends[file]):
                offset, digest = self.ends[file], hashlib.sha256()
                if offset % ITEM_BYTES[piece.dtype]:
                    raise LayoutError(
                        f"{piece.name} would begin at byte {offset}, which its dtype {piece.dtype} cannot",
                        code="quantize.alignment",
                        repair="sizes of this model are odd: use another format or group size",
                    )
                for part in piece.parts:
                    data = part.reshape(-1).view("u1").data
                    digest.update(data)
                    target.write(data)
                    self.ends[file] += len(data)
                assert self.ends[file] - offset == num_bytes(piece.dtype, piece.shape), f"{piece.name} is not whole"
                entries.append(Entry(piece.name, piece.dtype, piece.shape, file, offset, digest.hexdigest()))
            target.flush()
            os.fsync(target.fileno())
        if is_new:
            sync_directory(self.directory)
        return entries

    def finish(self, entries: Sequence[Entry]) -> dict[str, Header]:
        """Write the headers and the index; return the headers by file name."""
        headers = {}
        for file, name in enumerate(self.names):
            document: dict[str, object] = {"__metadata__": PT_METADATA}
            for entry in sorted((entry for entry in entries if entry.file == file), key=lambda entry: entry.offset):
                offsets = [entry.offset, entry.end]
                document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
            text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
            room = self.head_bytes[file] - 8
            assert len(text) <= room, f"the header of {name} has {len(text)} bytes, there is room for {room}"
            raw = room.to_bytes(8, "little") + text + b" " * (room - len(text))
            with open(self.path(file), "r+b") as target:
                target.write(raw)
                target.flush()
                os.fsync(target.fileno())
            headers[name] = parse_header(raw, name)
        for name, data in index_of(headers).items():
            (self.directory / name).write_bytes(data)
        return headers


def digests_of(entries: Iterable[Entry]) -> dict[str, TensorDigest]:
    """Return what goes into the manifest."""
    return {entry.name: TensorDigest(entry.dtype, entry.shape, entry.sha256) for entry in entries}
