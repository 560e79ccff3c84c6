"""What makes a step the same step again: what it was told, and the content of what it reads.

Paths of the voyage are taken out of what is compared, so that a voyage may be moved or renamed as a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ferry.control.voyage.voyage import Voyage
from ferry.core.manifest import MANIFEST_NAME, read_manifest

CHUNK = 1 << 20


def step_identity(voyage: Voyage, kind: str, told: Any, inputs: dict[str, str]) -> str:
    """Return a sha256 over what a step was told and the content ids of its inputs."""
    text = json.dumps({"kind": kind, "told": told, "inputs": inputs}, sort_keys=True, default=str)
    for path, name in ((voyage.output, "${output}"), (voyage.file.parent, "${here}")):
        text = text.replace(json.dumps(str(path))[1:-1], name)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs_of_paths(paths: Iterable[Path]) -> dict[str, str]:
    """Return the content id of each path that exists."""
    return {str(path): content_id(path) for path in paths if path.exists()}


def inputs_of_words(words: Iterable[str], folder: Path) -> dict[str, str]:
    """Return the content id of each word that names a file or directory, seen from a folder."""
    found = {}
    for word in words:
        if word == sys.executable:
            found["python"] = platform.python_version()
        elif word and len(word) < 4096 and "\0" not in word and os.path.exists(folder / word):
            found[word] = content_id(folder / word)
    return found


def content_id(path: Path) -> str:
    """Return what identifies the content of a path: a manifest's id, a file's sha256, a directory's listing."""
    if (path / MANIFEST_NAME).is_file():
        return read_manifest(path).id
    total = hashlib.sha256()
    if path.is_file():
        with open(path, "rb") as file:
            while data := file.read(CHUNK):
                total.update(data)
        return total.hexdigest()
    for file_path in sorted(item for item in path.rglob("*") if item.is_file()):
        stat = file_path.stat()
        total.update(f"{file_path.relative_to(path)}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode())
    return f"stat:{total.hexdigest()}"
