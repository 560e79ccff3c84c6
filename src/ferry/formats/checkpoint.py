"""What any checkpoint looks like once opened, and what any checkpoint to be written looks like once planned.

Formats meet only here: reading gives a `Checkpoint`, planning gives a `Draft`, both in slots over canonical tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ferry.core.carry import Spec, TargetFile
from ferry.core.dtypes import num_bytes
from ferry.core.errors import InputError
from ferry.core.family import Model
from ferry.core.layout import Slot


@dataclass(frozen=True)
class Assets:
    """Everything of a model directory that is not weights: path below the directory -> where it lies now."""

    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened for reading: headers only."""

    directory: Path
    format: str
    model: Model
    slots: tuple[Slot, ...]
    assets: Assets
    layout: dict[str, Any] = field(default_factory=dict)
    """Format-specific facts, as JSON values: tp, pp, names, iteration ..."""
    frames: Mapping[str, bytes] = field(default_factory=dict)
    """Raw headers of the Hugging Face weight files this model came in, by file name: to restore them byte for byte."""
    carried: Mapping[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    """Tensors without a place in Megatron: name -> (dtype, shape, bytes)."""
    tied_copies: tuple[str, ...] = ()
    """Further names under which the Hugging Face files of a tied model store the embedding."""

    def specs(self) -> dict[str, Spec]:
        """Return every canonical tensor with the dtype found in the slots."""
        dtypes: dict[str, str] = {}
        for slot in self.slots:
            for piece in slot.local.pieces:
                if dtypes.setdefault(piece.name, slot.dtype) != slot.dtype:
                    raise InputError(
                        f"{slot.label} in {slot.path} is {slot.dtype}, other parts of {piece.name} are "
                        f"{dtypes[piece.name]}",
                        code="checkpoint.mixed-dtype",
                    )
        return {
            name: Spec(dtypes[name], shape[0], shape[1] if len(shape) > 1 else 1)
            for name, shape in self.model.canonical().items()
        }

    def payload_ranges(self) -> dict[Path, tuple[tuple[int, int], ...]]:
        """Return the sorted byte ranges of all slots, by weight file: the rest of a file is its envelope."""
        return payload_ranges(self.slots)


def payload_ranges(slots: Iterable[Slot]) -> dict[Path, tuple[tuple[int, int], ...]]:
    ranges: dict[Path, list[tuple[int, int]]] = {}
    for slot in slots:
        end = slot.offset + num_bytes(slot.dtype, slot.local.shape)
        ranges.setdefault(slot.path, []).append((slot.offset, end))
    return {path: tuple(sorted(found)) for path, found in ranges.items()}


@dataclass(frozen=True)
class Draft:
    """A checkpoint about to be written into a directory: weight files by the carrier, small files as they are."""

    format: str
    files: tuple[TargetFile, ...]
    small: dict[str, bytes | Path]
    """Path below the directory -> bytes, or a file to copy."""
    layout: dict[str, Any]
    last: dict[str, bytes] = field(default_factory=dict)
    """Files that make the rest count (tracker, metadata): written after everything else."""
    changes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        small = {**self.small, **self.last}
        sizes = (item.stat().st_size if isinstance(item, Path) else len(item) for item in small.values())
        return sum(file.num_bytes for file in self.files) + sum(sizes)

    def write_small(self, directory: Path) -> None:
        """Write the files that are no weights, those that make the rest count last."""
        for name, content in {**self.small, **self.last}.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
