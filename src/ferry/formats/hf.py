"""Hugging Face model directories: safetensors (single or sharded with an index), or torch `.bin` files for reading.

Opening reads headers only and accounts for every tensor: each must be a canonical tensor of the family, a copy that a
tied model may keep, or a tensor the family carries along. Writing is in `hf_write`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ferry.core.dtypes import num_bytes
from ferry.core.errors import InputError
from ferry.core.family import EMBEDDING, HEAD, Model
from ferry.core.layout import Part, Slot, whole
from ferry.core.manifest import MANIFEST_NAME
from ferry.core.safetensors import read_header
from ferry.families.registry import model_of, read_config
from ferry.formats.checkpoint import Assets, Checkpoint
from ferry.formats.pickles import TensorRef
from ferry.formats.torch_zip import open_torch

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


class Found(NamedTuple):
    """A tensor as it lies in a weight file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Weights(NamedTuple):
    found: dict[str, Found]
    files: list[Path]
    frames: dict[str, bytes]


def is_hf(directory: Path) -> bool:
    """Say whether a directory looks like a Hugging Face model."""
    return (directory / "config.json").is_file()


def open_hf(directory: Path) -> Checkpoint:
    """Open a model directory; raise InputError naming every tensor that is missing, extra or of another shape."""
    model = model_of(read_config(directory / "config.json"), str(directory / "config.json"))
    weights = _find_weights(directory)
    slots, extra = _account(model, weights.found, directory)
    carried = {
        name: (item.dtype, item.shape, _read_bytes(item)) for name, item in weights.found.items() if name in extra
    }
    return Checkpoint(
        directory=directory,
        format="hf",
        model=model,
        slots=tuple(slots),
        assets=find_assets(directory),
        layout={"files": sorted(path.name for path in weights.files)},
        frames=weights.frames,
        carried=carried,
        # Torch files come back as new safetensors files, which hold a tied embedding once.
        tied_copies=tuple(slot.label for slot in slots if slot.label not in model.canonical() and weights.frames),
    )


def find_assets(directory: Path) -> Assets:
    """Return every file of a model directory that is neither weights nor Ferry's own, nor part of another artifact."""
    files = {}
    for folder, folders, names in os.walk(directory):
        place = Path(folder)
        inside = [name for name in folders if not name.startswith(".") and not (place / name / MANIFEST_NAME).is_file()]
        folders[:] = sorted(inside)
        for name in names:
            path = place / name
            if not name.startswith(".") and not is_weight_file(name) and name != MANIFEST_NAME and path.is_file():
                files[path.relative_to(directory).as_posix()] = path
    return Assets(dict(sorted(files.items())))


def is_weight_file(name: str) -> bool:
    """Say whether a file name is one of weights. The safetensors index is not: it returns with the original files."""
    return name.endswith((*WEIGHT_ENDINGS, ".bin.index.json"))


def missing_assets(assets: Assets) -> list[str]:
    """Name what a model directory needs to be used at once and does not have."""
    lacking = [name for name in ("generation_config.json", "tokenizer_config.json") if name not in assets.files]
    if not any(Path(name).match(pattern) for name in assets.files for pattern in TOKENIZER_FILES):
        lacking.append("tokenizer files (tokenizer.json, tokenizer.model, vocab.json, vocab.txt or *.tiktoken)")
    return lacking


def _find_weights(directory: Path) -> _Weights:
    if (directory / INDEX).is_file():
        return _open_all(directory, _indexed(directory, INDEX), _open_safetensors)
    singles = sorted(directory.glob("*.safetensors"))
    if len(singles) == 1:
        return _open_all(directory, [singles[0].name], _open_safetensors)
    if singles:
        raise InputError(
            f"{directory} has {len(singles)} safetensors files and no {INDEX}",
            code="hf.no-index",
            repair="the download is incomplete: fetch it again",
        )
    if (directory / BIN_INDEX).is_file():
        return _open_all(directory, _indexed(directory, BIN_INDEX), _open_bin)
    if (directory / "pytorch_model.bin").is_file():
        return _open_all(directory, ["pytorch_model.bin"], _open_bin)
    raise InputError(f"{directory} has no weights (*.safetensors or pytorch_model.bin)", code="hf.no-weights")


def _indexed(directory: Path, index: str) -> list[str]:
    """Return the files an index names, after checking that they are there."""
    try:
        names = sorted(set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{directory / index} cannot be read: {error}", code="hf.index") from None
    absent = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    if absent:
        raise InputError(
            f"{directory / index} names {', '.join(absent)}, which are not there",
            code="hf.missing-file",
            repair="the download is incomplete: fetch it again",
        )
    return names


def _open_all(directory: Path, names: list[str], opener: Callable[[Path, _Weights], None]) -> _Weights:
    weights = _Weights({}, [], {})
    for name in names:
        opener(directory / name, weights)
    return weights


def _note(weights: _Weights, name: str, item: Found) -> None:
    if name in weights.found:
        raise InputError(f"tensor {name} is in {weights.found[name].path} and in {item.path}", code="hf.twice")
    weights.found[name] = item


def _open_safetensors(path: Path, weights: _Weights) -> None:
    header = read_header(path)
    for name, entry in header.tensors.items():
        _note(weights, name, Found(path, entry.dtype, entry.shape, entry.start))
    weights.frames[path.name] = header.raw
    weights.files.append(path)


def _open_bin(path: Path, weights: _Weights) -> None:
    archive = open_torch(path)
    if not isinstance(archive.structure, dict):
        raise InputError(f"{path} does not hold a dictionary of tensors", code="hf.bin")
    for name, tensor in archive.structure.items():
        if name == "_metadata":
            continue
        if not isinstance(tensor, TensorRef):
            raise InputError(f"{path}: {name} is {tensor!r}, expected a tensor", code="hf.bin")
        extent = archive.extent(name, tensor)
        _note(weights, name, Found(path, extent.dtype, extent.shape, extent.offset))
    weights.files.append(path)


def _account(model: Model, found: dict[str, Found], directory: Path) -> tuple[list[Slot], set[str]]:
    """Return the slots of all canonical tensors, and the names of those to be carried; refuse anything else."""
    wanted = model.canonical()
    slots = [_slot(name, item, as_part(name, item.shape)) for name, item in found.items() if name in wanted]
    extra = {name for name in found if name not in wanted}
    tied_head = model.roles.get(HEAD)
    if model.dims.tied and isinstance(tied_head, str) and tied_head in extra:
        # A tied model may store its embedding twice: the second is a copy, compared while carrying.
        extra.discard(tied_head)
        slots.append(_slot(tied_head, found[tied_head], model.part(EMBEDDING)))
    carried = {name for name in extra if model.is_carried(name)}
    _refuse_strangers(model, found, sorted(extra - carried), directory)
    return slots, carried


def _slot(name: str, item: Found, part: Part) -> Slot:
    return Slot(item.path, item.offset, item.dtype, whole(part), name)


def as_part(name: str, shape: tuple[int, ...]) -> Part:
    """Return a whole stored tensor as a part of itself."""
    return Part(name, 0, shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1, len(shape))


def _refuse_strangers(model: Model, found: dict[str, Found], unknown: list[str], directory: Path) -> None:
    wanted = model.canonical()
    missing = [name for name in wanted if name not in found]
    shapes = [
        f"{name} {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    complaints = [
        f"{len(names)} {word}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for word, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if complaints:
        raise InputError(
            f"{directory} is not a complete {model.family.name} model; tensors {'; '.join(complaints)}",
            code="hf.tensors",
            repair="nothing was written; a new family is one file: docs/porting-a-family.md",
        )


def _read_bytes(item: Found) -> bytes:
    with open(item.path, "rb") as file:
        file.seek(item.offset)
        return file.read(num_bytes(item.dtype, item.shape))
