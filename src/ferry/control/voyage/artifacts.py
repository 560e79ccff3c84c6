"""The artifacts of a voyage, with their manifests: what the verdict, the picture and the proofs are made of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.core.errors import FerryError
from ferry.core.manifest import MANIFEST_NAME, Manifest, read_manifest

ADAPTER = "peft-adapter"


@dataclass(frozen=True)
class Artifact:
    """What one step made (or found made already)."""

    step: str
    verb: str
    seconds: float
    path: Path
    manifest: Manifest
    told: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.manifest.files.values())

    @property
    def is_changed(self) -> bool:
        """Say whether it declares that it holds something else than its parent: trained, quantized, an adapter."""
        manifest = self.manifest
        return bool(manifest.parents) and (bool(manifest.changes) or manifest.kind == ADAPTER)

    @property
    def kind(self) -> str:
        return kind_text(self.manifest.kind)

    @property
    def layout(self) -> str:
        """Return the layout of shards in words: `TP3 × PP2`; "" where there are none."""
        layout = self.manifest.details.get("layout") or {}
        sizes = {name: layout.get(name) for name in ("tp", "pp", "vpp", "ep")}
        shown = [f"{name.upper()}{size}" for name, size in sizes.items() if size and (size > 1 or name in ("tp", "pp"))]
        return " × ".join(shown)

    @property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns of the shards: tensor ranks by pipeline ranks."""
        layout = self.manifest.details.get("layout") or {}
        return int(layout.get("tp") or 1), int(layout.get("pp") or 1)


def kind_text(kind: str) -> str:
    """Return a kind of artifact as people say it."""
    word = kind.removesuffix("-model").removesuffix("-checkpoint")
    known = {
        "hf": "Hugging Face",
        "gguf": "GGUF",
        "megatron": "Megatron",
        "torch-dist": "Megatron dist",
        "peft-adapter": "LoRA adapter",
    }
    return known.get(word, word)


def artifacts_of(entries: Iterable[Mapping[str, Any]], output: Path) -> list[Artifact]:
    """Return the artifacts of all steps, in order; what has no readable manifest proves nothing and is left out."""
    found = []
    for entry in entries:
        place = (entry.get("artifact") or {}).get("target")
        path = Path(os.path.abspath(output / place)) if place else None
        if path is None or not (path / MANIFEST_NAME).is_file():
            continue
        try:
            manifest = read_manifest(path)
        except FerryError:
            continue
        found.append(Artifact(entry["name"], entry["kind"], entry["seconds"], path, manifest, entry["told"]))
    return found


def looked_at(told: Any, path: Path) -> bool:
    """Return whether a path is among the values that a step was told."""
    if isinstance(told, Mapping):
        return any(looked_at(value, path) for value in told.values())
    if isinstance(told, list | tuple):
        return any(looked_at(value, path) for value in told)
    return isinstance(told, str) and "/" in told and os.path.abspath(told) == str(path)


def num_equal_tensors(artifacts: list[Artifact]) -> tuple[int, int]:
    """Return how many tensors have one digest in all artifacts, and how many different tensors there are."""
    names = {name for artifact in artifacts for name in artifact.manifest.tensors}
    equal = 0
    for name in names:
        digests = {artifact.manifest.tensors.get(name) for artifact in artifacts}
        one = next(iter(digests))
        equal += len(digests) == 1 and one is not None and bool(one.sha256)
    return equal, len(names)
