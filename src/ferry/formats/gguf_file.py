"""The GGUF container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): its header, without its tensors.

Little-endian: magic, version, two counts, the metadata, one entry per tensor, padding, then the tensors. The header is
read here rather than by the `gguf` package because that one makes several arrays of every token of the vocabulary:
2 seconds and 200 MB for a file of 98 MB.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.dtypes import num_items
from ferry.core.errors import InputError, UnavailableError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """A tensor at rest: its ggml type, its shape with rows first (as in Hugging Face), and where its bytes are."""

    type: int
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def required(self, key: str) -> Any:
        """Return a value that the file must have."""
        if key not in self.metadata:
            raise InputError(f"{self.path} has no metadata {key}", code="gguf.metadata")
        return self.metadata[key]


def read_gguf(path: Path) -> GgufFile:
    """Return the header of a GGUF file after checking that every tensor lies inside the file."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file: it does not begin with 'GGUF'", code="gguf.magic")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(path, _Cursor(data))
            except (struct.error, UnicodeDecodeError, IndexError, KeyError, OverflowError) as error:
                raise InputError(
                    f"{path} has a GGUF header that cannot be read: {error}",
                    code="gguf.header",
                    repair="the file is cut or damaged: fetch it again",
                ) from None


def row_sizes(ggml_type: int) -> tuple[int, int]:
    """Return (values, bytes) of one block of a ggml type."""
    gguf = import_gguf()
    values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(ggml_type)]
    return int(values), int(num_bytes)


def import_gguf() -> Any:
    """Return the `gguf` package, which knows the quantized types."""
    try:
        import gguf
    except ImportError:
        raise UnavailableError(
            "reading a GGUF file needs the package gguf", code="gguf.package", repair="pip install 'llmferry[pull]'"
        ) from None
    return gguf


class _Cursor:
    """A place in the file that moves as it is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 4

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.place)
        self.place += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        end = self.place + length
        if end > len(self.data):
            raise IndexError(f"a text of {length} bytes at byte {self.place}, the file has {len(self.data)}")
        raw = self.data[self.place : end]
        self.place = end
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, length = self.scalar("I"), self.scalar("Q")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(length)]
        values = struct.unpack_from(f"<{length}{_SCALARS[inner]}", self.data, self.place)
        self.place += struct.calcsize(f"<{length}{_SCALARS[inner]}")
        return list(values)


def _read(path: Path, cursor: _Cursor) -> GgufFile:
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise InputError(
            f"{path} has GGUF version {version}, expected 2 or 3 (little-endian)",
            code="gguf.version",
            repair="write it anew with a current llama.cpp",
        )
    num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_fields):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = {}
    for _ in range(num_tensors):
        name = cursor.text()
        sizes = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
        entries[name] = (tuple(reversed(sizes)), cursor.scalar("I"), cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    data_start = -(-cursor.place // alignment) * alignment
    tensors = {
        name: _tensor(path, name, shape, ggml_type, data_start + offset, len(cursor.data))
        for name, (shape, ggml_type, offset) in entries.items()
    }
    return GgufFile(path, metadata, tensors)


def _tensor(path: Path, name: str, shape: tuple[int, ...], ggml_type: int, start: int, file_bytes: int) -> GgufTensor:
    try:
        block_values, block_bytes = row_sizes(ggml_type)
    except ValueError:
        raise InputError(
            f"{path}: tensor {name} has the unknown ggml type {ggml_type}",
            code="gguf.type",
            repair="a newer gguf package may know it: pip install -U gguf",
        ) from None
    if not shape or shape[-1] % block_values:
        raise InputError(f"{path}: tensor {name} of shape {shape} has no whole blocks", code="gguf.header")
    num_bytes = num_items(shape) // block_values * block_bytes
    if start + num_bytes > file_bytes:
        raise InputError(
            f"{path} is cut: tensor {name} ends at byte {start + num_bytes}, the file has {file_bytes}",
            code="gguf.cut",
            repair="fetch it again",
        )
    return GgufTensor(ggml_type, shape, start, num_bytes)
