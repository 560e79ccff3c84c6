"""What every kind of source offers: facts known before anything is moved, and a way to move it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.core.manifest import FileDigest, Manifest, TensorDigest
from ferry.core.plan import PlannedFile
from ferry.core.progress import Reporter


@dataclass(frozen=True)
class Fetched:
    """What a source has put into the directory."""

    tensors: dict[str, TensorDigest]
    files: dict[str, FileDigest]
    description: dict[str, Any]
    """The source as the manifest names it: never with an absolute path."""
    changes: tuple[str, ...] = ()
    parent: Manifest | None = None


@dataclass(frozen=True)
class Source:
    """A model that can be brought here."""

    label: str
    state: str
    """Changes when the source changes, and costs no reading of weights: equal states are the same pull."""
    files: tuple[PlannedFile, ...]
    read_bytes: int
    write_bytes: int
    fetch: Callable[[Path, Reporter], AbstractContextManager[Fetched]]
    """Puts everything into a directory; leaving the context says that it is visible and nothing need be kept."""
    choices: tuple[str, ...] = ()


def state_of(root: Path, paths: Iterable[Path]) -> str:
    """Return a digest of names, sizes and times of change: cheap, and different whenever a file was written to."""
    total = hashlib.sha256()
    for path in sorted(paths):
        status = os.stat(path)
        total.update(f"{path.relative_to(root)}\t{status.st_size}\t{status.st_mtime_ns}\n".encode())
    return total.hexdigest()
