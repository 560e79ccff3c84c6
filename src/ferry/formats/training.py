"""Ferry's training checkpoints: a directory per step, each rank's tensors with digests, and one document written last.

    step-00000010/
      rank-00000.safetensors   this rank's tensors: NAME the weight, NAME@exp_avg and NAME@exp_avg_sq its moments
      rank-00000.json          what they are: rectangles of canonical tensors, and the sha256 of each
      state.json               step, mesh, everything else that resuming needs, digests of the files above; written last

A stored tensor is described by its pieces of canonical tensors, as in every other format, so a checkpoint is loaded on
any layout and exported by the carrier. A directory counts only if every digest in it holds: no pointer is trusted.
Moments are canonical tensors with the suffix of their kind. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.errors import InputError, IntegrityError
from ferry.core.layout import Local, Piece, Slot
from ferry.core.safetensors import make_header, read_header
from ferry.core.staging import sync_directory, write_file

SCHEMA = "ferry.training-checkpoint/1"
STATE = "state.json"
PARTIAL = ".partial"
REJECTED = ".rejected"
_STEP = re.compile(r"step-(\d{8})")
_CHUNK = 1 << 22


class Stored(NamedTuple):
    """One tensor to be written: its name, what it holds, safetensors dtype, and its bytes."""

    name: str
    local: Local
    dtype: str
    data: memoryview


@dataclass(frozen=True)
class TrainingState:
    """A checkpoint, opened: the step it was taken after, its tensors, and what else the run needs to go on."""

    directory: Path
    step: int
    slots: tuple[Slot, ...]
    values: dict[str, Any] = field(default_factory=dict)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def rank_stem(rank: int) -> str:
    return f"rank-{rank:05d}"


def list_steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a directory of their final name, the newest first. None of them is verified."""
    if not checkpoints.is_dir():
        return []
    found = [_STEP.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def write_rank(directory: Path, rank: int, tensors: Sequence[Stored]) -> int:
    """Write one rank's tensors and their description, synced; return the bytes written."""
    stem = rank_stem(rank)
    header = make_header(((item.name, item.dtype, item.local.shape) for item in tensors), {"format": "pt"})
    digests: dict[str, str] = {}
    with open(directory / f"{stem}.safetensors", "xb") as file:
        file.write(header.raw)
        for item in tensors:
            file.write(item.data)
            digests[item.name] = hashlib.sha256(item.data).hexdigest()
        file.flush()
        os.fsync(file.fileno())
    described = {item.name: {"local": _to_json(item.local), "sha256": digests[item.name]} for item in tensors}
    document = {"header_sha256": header.sha256, "bytes": header.file_bytes, "tensors": described}
    write_file(directory / f"{stem}.json", json.dumps(document).encode())
    return header.file_bytes


def is_complete(directory: Path, num_ranks: int) -> bool:
    """Say whether every rank has written its part."""
    return all((directory / f"{rank_stem(rank)}.json").is_file() for rank in range(num_ranks))


def finish(directory: Path, target: Path, num_ranks: int, step: int, values: Mapping[str, Any]) -> None:
    """Write the document that makes a checkpoint count, and give it its final name. `target` must not exist."""
    files = {
        f"{rank_stem(rank)}.json": hashlib.sha256((directory / f"{rank_stem(rank)}.json").read_bytes()).hexdigest()
        for rank in range(num_ranks)
    }
    document = {"schema": SCHEMA, "step": step, "files": files, "values": dict(values)}
    document["sha256"] = _digest(document)
    write_file(directory / STATE, (json.dumps(document, indent=1) + "\n").encode())
    os.rename(directory, target)
    sync_directory(target.parent)


def read_state(directory: Path) -> TrainingState:
    """Return a checkpoint from its documents alone; raise IntegrityError if one is missing or damaged."""
    document = _read_document(directory)
    slots: list[Slot] = []
    for name, promised in document["files"].items():
        raw = _read(directory / name)
        if hashlib.sha256(raw).hexdigest() != promised:
            raise _damaged(directory, f"{name} was altered")
        rank = json.loads(raw)
        path = directory / f"{name.removesuffix('.json')}.safetensors"
        offsets = _header_of(path, rank)
        for label, item in rank["tensors"].items():
            entry = offsets[label]
            slots.append(Slot(path, entry.start, entry.dtype, _from_json(item["local"]), label))
    return TrainingState(directory, document["step"], tuple(slots), document["values"])


def num_files(directory: Path) -> int:
    """Return how many files of tensors a checkpoint has: what `verify_files` is shared out by."""
    return len(_read_document(directory)["files"])


def verify(directory: Path, part: int = 0, of: int = 1) -> TrainingState:
    """Check every byte of a checkpoint (or of every `of`-th file, from `part`) and return it."""
    state = read_state(directory)
    for name in list(_read_document(directory)["files"])[part::of]:
        rank = json.loads((directory / name).read_bytes())
        path = directory / f"{name.removesuffix('.json')}.safetensors"
        header = _header_of(path, rank)
        with open(path, "rb") as file:
            for label, item in rank["tensors"].items():
                if _sha256(file, header[label].start, header[label].end) != item["sha256"]:
                    raise _damaged(directory, f"{label} in {path.name} differs from its digest")
    return state


def remove(directory: Path) -> None:
    """Remove a checkpoint so that no moment of it looks like a good one."""
    (directory / STATE).unlink(missing_ok=True)
    shutil.rmtree(directory)


def of_kind(slots: Iterable[Slot], kind: str) -> tuple[Slot, ...]:
    """Return the slots of weights (""), or those of a moment, renamed to the weights they belong to."""
    suffix = f"@{kind}" if kind else ""
    found = []
    for slot in slots:
        name, at, word = slot.label.partition("@")
        if word != kind or bool(at) != bool(kind):
            continue
        pieces = tuple(piece._replace(name=piece.name.removesuffix(suffix)) for piece in slot.local.pieces)
        found.append(slot._replace(local=slot.local._replace(pieces=pieces), label=name))
    return tuple(found)


def _header_of(path: Path, rank: Mapping[str, Any]) -> Any:
    try:
        header = read_header(path)
    except (InputError, FileNotFoundError) as error:
        raise _damaged(path.parent, str(error)) from None
    if header.sha256 != rank["header_sha256"]:
        raise _damaged(path.parent, f"the header of {path.name} was altered")
    return header.tensors


def _read_document(directory: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(_read(directory / STATE))
        promised = document.pop("sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise _damaged(directory, f"{STATE} cannot be read: {error}") from None
    if _digest(document) != promised or document.get("schema") != SCHEMA:
        raise _damaged(directory, f"{STATE} was altered")
    return document


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path.parent, f"{path.name}: {error.strerror}") from None


def _damaged(directory: Path, what: str) -> IntegrityError:
    return IntegrityError(f"checkpoint {directory.name} is not whole: {what}", code="train.checkpoint-damaged")


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sha256(file: Any, start: int, end: int) -> str:
    total = hashlib.sha256()
    file.seek(start)
    left = end - start
    while left:
        data = file.read(min(_CHUNK, left))
        if not data:
            break
        total.update(data)
        left -= len(data)
    return total.hexdigest()


def _to_json(local: Local) -> list[Any]:
    return [
        local.rows,
        local.cols,
        local.ndim,
        [list(piece) for piece in local.pieces],
        local.pad_rows,
        list(local.declared),
    ]


def _from_json(item: Sequence[Any]) -> Local:
    rows, cols, ndim, pieces, pad_rows, declared = item
    return Local(rows, cols, ndim, tuple(Piece(*piece) for piece in pieces), pad_rows, tuple(declared))
