"""The safetensors container: headers only. Payload bytes are moved by the carrier, never through this file.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON object
`{name: {dtype, shape, data_offsets}}` padded with spaces, then the payloads without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.dtypes import ITEM_BYTES, num_bytes
from ferry.core.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


class Entry(NamedTuple):
    """A tensor in a file. `start` and `end` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself. `raw` is every byte before the payloads."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        return len(self.raw)

    @property
    def file_bytes(self) -> int:
        return max((entry.end for entry in self.tensors.values()), default=self.data_start)

    @property
    def sha256(self) -> str:
        """Return the digest of the envelope: all bytes of the file that are not payload."""
        return hashlib.sha256(self.raw).hexdigest()


def read_header(path: Path) -> Header:
    """Return the header of a file after checking that its offsets tile the file exactly."""
    file_bytes = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise InputError(
                f"{path} is not a safetensors file, or is cut: header of {length} bytes in a file of {file_bytes}",
                code="safetensors.header",
            )
        raw = prefix + file.read(length)
    header = parse_header(raw, str(path))
    if header.file_bytes != file_bytes:
        raise InputError(
            f"{path} has {file_bytes} bytes, its header promises {header.file_bytes}",
            code="safetensors.size",
            repair="the file is cut or damaged: fetch it again",
        )
    return header


def parse_header(raw: bytes, where: str) -> Header:
    try:
        document: dict[str, Any] = json.loads(raw[8:])
        metadata = document.pop("__metadata__", {})
        tensors = {name: _entry(item, len(raw)) for name, item in document.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where} has a safetensors header that cannot be read: {error}", code="safetensors.header"
        ) from None
    position = len(raw)
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position or entry.end - entry.start != num_bytes(entry.dtype, entry.shape):
            raise InputError(
                f"{where}: tensor {name} has bytes {entry.start}..{entry.end}, expected to start at {position} with "
                f"{num_bytes(entry.dtype, entry.shape)} bytes",
                code="safetensors.offsets",
            )
        position = entry.end
    return Header(tensors, metadata, raw)


def _entry(item: dict[str, Any], data_start: int) -> Entry:
    dtype, shape, (start, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype} is unknown")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape {shape} is not a list of sizes")
    return Entry(dtype, shape, data_start + start, data_start + end)


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> Header:
    """Return the header for (name, dtype, shape) triples stored in this order."""
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + num_bytes(dtype, shape)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return parse_header(len(text).to_bytes(8, "little") + text, "new file")
