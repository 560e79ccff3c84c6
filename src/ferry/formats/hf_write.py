"""A Hugging Face model directory, planned: the original files byte for byte where their headers are known."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ferry.core.carry import Spec, TargetFile
from ferry.core.dtypes import num_bytes
from ferry.core.family import EMBEDDING, HEAD, Model
from ferry.core.layout import Part, Slot, whole
from ferry.core.safetensors import Header, make_header, parse_header
from ferry.formats.checkpoint import Checkpoint, Draft
from ferry.formats.hf import INDEX, as_part

PT_METADATA = {"format": "pt"}
Typed = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype, shape)."""


def draft_hf(source: Checkpoint, specs: dict[str, Spec], directory: Path, max_shard_bytes: int) -> Draft:
    """Plan the weight files, the index, and all assets of a model directory."""
    model = source.model
    tensors = {name: (specs[name].dtype, shape) for name, shape in model.canonical().items()}
    tensors |= {name: (dtype, shape) for name, (dtype, shape, _) in source.carried.items()}
    originals = {name: parse_header(raw, name) for name, raw in source.frames.items()}
    restored = bool(originals) and _describe_the_same(model, originals, tensors)
    headers = originals if restored else _new_headers(tensors, max_shard_bytes)
    small: dict[str, bytes | Path] = {name: path for name, path in source.assets.files.items() if name != INDEX}
    if restored and INDEX in source.assets.files:
        small[INDEX] = source.assets.files[INDEX]
    elif list(headers) != ["model.safetensors"]:
        small[INDEX] = _index(headers)
    files = tuple(_weight_file(source, directory / name, header) for name, header in headers.items())
    return Draft("hf", files, small, layout={"files": sorted(headers), "restored": restored})


def _describe_the_same(model: Model, headers: dict[str, Header], tensors: Typed) -> bool:
    """Say whether the original headers describe exactly these tensors (training may have changed a dtype)."""
    stored = {name: entry[:2] for header in headers.values() for name, entry in header.tensors.items()}
    head = model.roles.get(HEAD)
    if model.dims.tied and isinstance(head, str) and head in stored:
        tensors = {**tensors, head: tensors[model.part(EMBEDDING).name]}
    return stored == dict(tensors)


def _new_headers(tensors: Typed, max_shard_bytes: int) -> dict[str, Header]:
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = num_bytes(dtype, shape)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": make_header(shards[0], PT_METADATA)}
    total = len(shards)
    return {
        f"model-{number:05}-of-{total:05}.safetensors": make_header(shard, PT_METADATA)
        for number, shard in enumerate(shards, 1)
    }


def _weight_file(source: Checkpoint, path: Path, header: Header) -> TargetFile:
    model, slots, ready = source.model, [], {0: header.raw}
    head = model.roles.get(HEAD)
    for name, entry in header.tensors.items():
        if name in source.carried:
            ready[entry.start] = source.carried[name][2]
            continue
        is_tied_copy = model.dims.tied and name == head
        part: Part = model.part(EMBEDDING) if is_tied_copy else as_part(name, entry.shape)
        slots.append(Slot(path, entry.start, entry.dtype, whole(part), name))

    def begin(fd: int) -> None:
        for offset, data in ready.items():
            os.pwrite(fd, data, offset)

    return TargetFile(path, header.file_bytes, tuple(slots), begin)


def _index(headers: dict[str, Header]) -> bytes:
    total = sum(header.file_bytes - header.data_start for header in headers.values())
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()
