"""Weight files of a Hugging Face directory, written one tensor after another: what is written need not be held.

The tensors (name, dtype, shape) are known beforehand, so headers, file names and the index are, too. A tensor may come
in several pieces. Memory is that of one piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferry.core.dtypes import num_bytes
from ferry.core.manifest import TensorDigest
from ferry.core.progress import Reporter
from ferry.core.safetensors import Header, make_header
from ferry.core.writeback import Writeback

INDEX = "model.safetensors.index.json"
PT_METADATA = {"format": "pt"}
SINGLE = "model.safetensors"
Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""


def shard_headers(tensors: Sequence[Tensor], max_shard_bytes: int) -> dict[str, Header]:
    """Return the header of each weight file by its name; a file is larger than the bound only if one tensor is."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = num_bytes(*tensor[1:])
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    total = len(shards)
    names = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    headers = [make_header(shard, PT_METADATA) for shard in shards]
    return dict(zip(names if total > 1 else [SINGLE], headers, strict=True))


def index_of(headers: Mapping[str, Header]) -> dict[str, bytes]:
    """Return the index as a small file by its name; nothing where there is one weight file."""
    if len(headers) == 1:
        return {}
    total = sum(header.file_bytes - header.data_start for header in headers.values())
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: (json.dumps(document, indent=2) + "\n").encode()}


def write_tensors(
    directory: Path,
    headers: Mapping[str, Header],
    pieces: Iterable[tuple[str, npt.NDArray[Any]]],
    reporter: Reporter,
) -> dict[str, TensorDigest]:
    """Write the weight files into a directory; return the digest of every tensor.

    `pieces` are (name, array) in the order of the headers. Arrays are written as their bytes are; those of one name
    follow each other and make up the tensor.
    """
    found: dict[str, TensorDigest] = {}
    waiting = iter(pieces)
    writeback = Writeback()
    for file_name, header in headers.items():
        with open(directory / file_name, "xb", buffering=0) as file:
            _write(file.fileno(), file, header.raw, writeback)
            for name, entry in header.tensors.items():
                total, missing = hashlib.sha256(), entry.end - entry.start
                while missing > 0:
                    given, array = next(waiting)
                    assert given == name, f"{given} came where {name} was expected"
                    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                    missing -= len(data)
                    assert missing >= 0, f"{name} has {-missing} bytes too many"
                    total.update(data)
                    _write(file.fileno(), file, data, writeback)
                    reporter.advance(len(data))
                found[name] = TensorDigest(entry.dtype, entry.shape, total.hexdigest())
    assert next(waiting, None) is None, "more came than the headers name"
    return found


def _write(fd: int, file: Any, data: bytes | memoryview, writeback: Writeback) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
    writeback.wrote(fd, len(data))
