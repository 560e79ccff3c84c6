"""A Hugging Face model directory, planned: the original files byte for byte where their headers are known."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ferry.core.carry import Spec, TargetFile
from ferry.core.family import EMBEDDING, HEAD, Model
from ferry.core.layout import Part, Slot, whole
from ferry.core.safetensors import Header, parse_header
from ferry.formats.checkpoint import Checkpoint, Draft
from ferry.formats.hf import INDEX, as_part
from ferry.formats.hf_stream import Tensor, index_of, shard_headers

Typed = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype, shape)."""


def draft_hf(source: Checkpoint, specs: dict[str, Spec], directory: Path, max_shard_bytes: int) -> Draft:
    """Plan the weight files, the index, and all assets of a model directory."""
    model = source.model
    tensors = {name: (specs[name].dtype, shape) for name, shape in model.canonical().items()}
    tensors |= {name: (dtype, shape) for name, (dtype, shape, _) in source.carried.items()}
    originals = {name: parse_header(raw, name) for name, raw in source.frames.items()}
    restored = bool(originals) and _describe_the_same(model, originals, tensors)
    headers = originals if restored else shard_headers(_triples(tensors), max_shard_bytes)
    small: dict[str, bytes | Path] = {name: path for name, path in source.assets.files.items() if name != INDEX}
    if restored and INDEX in source.assets.files:
        small[INDEX] = source.assets.files[INDEX]
    else:
        small |= index_of(headers)
    files = tuple(_weight_file(source, directory / name, header) for name, header in headers.items())
    return Draft("hf", files, small, layout={"files": sorted(headers), "restored": restored})


def _describe_the_same(model: Model, headers: dict[str, Header], tensors: Typed) -> bool:
    """Say whether the original headers describe exactly these tensors (training may have changed a dtype)."""
    stored = {name: entry[:2] for header in headers.values() for name, entry in header.tensors.items()}
    head = model.roles.get(HEAD)
    if model.dims.tied and isinstance(head, str) and head in stored:
        tensors = {**tensors, head: tensors[model.part(EMBEDDING).name]}
    return stored == dict(tensors)


def _triples(tensors: Typed) -> list[Tensor]:
    return [(name, *typed) for name, typed in tensors.items()]


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
