"""One reading of a file gives all its digests, and its copy.

The payload of a safetensors file is covered by one digest per tensor; every other byte of it by the envelope digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ferry.core.errors import IntegrityError
from ferry.core.manifest import FileDigest, TensorDigest
from ferry.core.progress import Reporter
from ferry.core.safetensors import read_header

CHUNK_BYTES = 1 << 20


class Digested(NamedTuple):
    file: FileDigest
    tensors: dict[str, TensorDigest]
    sha256: str
    """Of the whole file; "" where it was not asked for."""


def digest_file(path: Path, reporter: Reporter, *, copy_to: Path | None = None, whole: bool = False) -> Digested:
    """Read a file once: hash it, and copy it if a target is given. `whole` asks for the sha256 of all of it too."""
    with open(path, "rb") as source:
        if copy_to is None:
            return _digest(path, source, None, reporter, whole=whole)
        with open(copy_to, "wb") as target:
            return _digest(path, source, target, reporter, whole=whole)


def git_blob_sha1(path: Path) -> str:
    """Return the id under which git, and so the hub, knows a small file."""
    total = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    total.update(path.read_bytes())
    return total.hexdigest()


def _digest(path: Path, source: BinaryIO, target: BinaryIO | None, reporter: Reporter, *, whole: bool) -> Digested:
    total = hashlib.sha256()
    tensors: dict[str, TensorDigest] = {}
    if path.suffix == ".safetensors":
        header = read_header(path)
        file = FileDigest(header.file_bytes, header.sha256, "envelope")
        parts = [("", header.data_start)]
        entries = sorted(header.tensors.items(), key=lambda item: item[1].start)
        parts += [(name, entry.end - entry.start) for name, entry in entries]
    else:
        parts = [("", path.stat().st_size)]
        whole = True
    for name, num_bytes in parts:
        sha256 = hashlib.sha256()
        for chunk in _chunks(source, num_bytes, path):
            if name:
                sha256.update(chunk)
            if whole:
                total.update(chunk)
            if target is not None:
                target.write(chunk)
            reporter.advance(len(chunk))
        if name:
            entry = header.tensors[name]
            tensors[name] = TensorDigest(entry.dtype, entry.shape, sha256.hexdigest())
    if path.suffix != ".safetensors":
        file = FileDigest(parts[0][1], total.hexdigest())
    return Digested(file, tensors, total.hexdigest() if whole else "")


def _chunks(source: BinaryIO, num_bytes: int, path: Path) -> Iterator[bytes]:
    while num_bytes:
        chunk = source.read(min(CHUNK_BYTES, num_bytes))
        if not chunk:
            raise IntegrityError(f"{path} became shorter while it was read", code="pull.changed")
        num_bytes -= len(chunk)
        yield chunk
