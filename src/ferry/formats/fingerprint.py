"""Proofs about files: what identifies a checkpoint, and the digests that go into a manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from ferry.core.family import EMBEDDING
from ferry.core.layout import Slot
from ferry.core.manifest import MANIFEST_NAME, FileDigest, Manifest, TensorDigest, read_manifest
from ferry.core.safetensors import read_header
from ferry.formats.checkpoint import Checkpoint, payload_ranges
from ferry.formats.torch_zip import envelope_sha256

_CHUNK = 1 << 20


def manifest_of(directory: Path) -> Manifest | None:
    """Return a directory's manifest, or None where there is none."""
    return read_manifest(directory) if (directory / MANIFEST_NAME).is_file() else None


class Located(Protocol):
    """A checkpoint of any kind: where it lies, and which bytes of its files are tensors."""

    @property
    def directory(self) -> Path: ...
    def payload_ranges(self) -> dict[Path, tuple[tuple[int, int], ...]]: ...


def content_id(checkpoint: Located) -> str:
    """Return the manifest's id, or one made of the weight files' names, sizes and times where there is none."""
    manifest = manifest_of(checkpoint.directory)
    if manifest is not None:
        return manifest.id
    stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.payload_ranges())
    return "stat:" + hashlib.sha256(repr(stats).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a whole file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            total.update(data)
    return total.hexdigest()


def tensor_digests(checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, TensorDigest]:
    """Return the digest of every tensor of the Hugging Face form: canonical, carried, copies of a tied embedding."""
    specs, shapes = checkpoint.specs(), checkpoint.model.canonical()
    found = {name: TensorDigest(spec.dtype, shapes[name], digests[name]) for name, spec in specs.items()}
    for name, (dtype, shape, data) in checkpoint.carried.items():
        found[name] = TensorDigest(dtype, shape, hashlib.sha256(data).hexdigest())
    embedding = checkpoint.model.part(EMBEDDING).name
    found |= dict.fromkeys(checkpoint.tied_copies, found[embedding])
    return dict(sorted(found.items()))


def damaged_files(directory: Path, manifest: Manifest) -> list[str]:
    """Return the files that are missing, of another size, or (small ones) of other content than the manifest says."""
    found = []
    for name, digest in manifest.files.items():
        path = directory / name
        same_size = path.is_file() and path.stat().st_size == digest.num_bytes
        if not same_size or (digest.covers == "file" and file_sha256(path) != digest.sha256):
            found.append(name)
    return found


def file_digests(directory: Path, slots: Iterable[Slot]) -> dict[str, FileDigest]:
    """Return the digest of every file below a directory: whole, or the envelope of those that hold slots."""
    ranges = payload_ranges(slots)
    digests = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name == MANIFEST_NAME:
            continue
        if path.suffix == ".safetensors" and path in ranges:
            digests[name] = FileDigest(os.path.getsize(path), read_header(path).sha256, "envelope")
        elif path in ranges:
            digests[name] = FileDigest(os.path.getsize(path), envelope_sha256(path, ranges[path]), "envelope")
        else:
            digests[name] = FileDigest(os.path.getsize(path), file_sha256(path))
    return digests
