"""Writes a LoRA adapter: the files that PEFT reads, and a manifest that remembers the model it was trained on.

What was written is opened again before the manifest is made, by the reader that judges adapters of others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.carry import carry
from ferry.core.dtypes import num_bytes
from ferry.core.family import Model
from ferry.core.floats import Float32
from ferry.core.manifest import MANIFEST_NAME, Manifest, Node, TensorDigest
from ferry.core.progress import Reporter
from ferry.core.safetensors import make_header
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import file_digests, manifest_of, tensor_digests
from ferry.formats.peft import KIND, PREFIX, WEIGHTS, Adapter, check_fits, in_memory, named_for, open_adapter
from ferry.formats.peft_config import CONFIG, AdapterConfig
from ferry.formats.peft_targets import short_targets


@dataclass(frozen=True)
class Base:
    """The model an adapter is trained on: what is remembered of it."""

    name: str
    model: Model
    tensors: Mapping[str, TensorDigest]
    model_sha256: str
    lineage: tuple[Node, ...]
    """Its own node first, then its ancestors."""


@dataclass(frozen=True)
class Making:
    """How an adapter came to be, for its manifest: a name, one sentence, the settings (no paths)."""

    name: str
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    verb: str = "train"


def base_of(source: Checkpoint, reporter: Reporter, threads: int = 2) -> Base:
    """Return a model's identity from its manifest; where there is none, every tensor is read and hashed."""
    name = source.directory.resolve().name
    manifest = manifest_of(source.directory)
    if manifest is not None and manifest.model_sha256:
        return Base(name, source.model, manifest.tensors, manifest.model_sha256, manifest.ancestry())
    specs = source.specs()
    total = sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in specs.values())
    reporter.start(f"hashing {name}", total)
    digests = tensor_digests(source, carry(specs, source.slots, (), reporter=reporter, threads=threads))
    reporter.finish()
    read = Manifest(kind=source.format, name="", verb="", summary="", tensors=digests)
    node = Node(read.id, source.format, name, "", "came without a manifest", "", read.model_sha256)
    lineage = manifest.ancestry() if manifest is not None else (node,)
    return Base(name, source.model, digests, read.model_sha256, lineage)


def new_config(
    model: Model, modules: Sequence[str], *, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False,
    base_name: str = "",
) -> AdapterConfig:  # fmt: skip
    """Return the config of an adapter for these modules of a model, one rank for all."""
    targets = short_targets(model, modules)
    return AdapterConfig(
        rank, alpha, targets, dropout, use_rslora=use_rslora, base_model_name_or_path=base_name, task_type="CAUSAL_LM"
    )


def write_adapter(
    work: Path, config: AdapterConfig, tensors: Mapping[str, Float32], *, base: Base, making: Making
) -> Manifest:
    """Write an adapter into an empty directory (of a StagedDirectory) and return its manifest.

    `tensors` are `MODULE.lora_A.weight` [R, I] and `MODULE.lora_B.weight` [O, R] by the names of the base model.
    """
    names = {name: PREFIX + in_memory(base.model, name) for name in sorted(tensors)}
    header = make_header([(names[name], "F32", tensors[name].shape) for name in names], {"format": "pt"})
    with open(work / WEIGHTS, "wb") as file:
        file.write(header.raw)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name], np.float32).data)
    (work / CONFIG).write_text(json.dumps(config.to_json(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    adapter = open_adapter(work)
    check_fits(named_for(adapter, base.model), base.model, base.name)
    manifest = Manifest(
        kind=KIND,
        name=making.name,
        verb=making.verb,
        summary=making.summary,
        config=dict(making.settings),
        tensors=adapter_digests(adapter),
        files=file_digests(work, ()),
        details={
            "family": base.model.family.name,
            "base": {"name": base.name, "model_sha256": base.model_sha256, "id": base.lineage[0].id},
            "rank": config.rank,
            "alpha": config.alpha,
            "targets": config.targets,
            "modules": len(adapter.modules),
        },
        parents=(base.lineage[0].id,),
        lineage=base.lineage,
    )
    (work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def adapter_digests(adapter: Adapter) -> dict[str, TensorDigest]:
    """Return the digest of every matrix by the name it has in its file."""
    found = {}
    for pair in adapter.modules.values():
        for stored in pair:
            found[stored.name] = TensorDigest(stored.dtype, stored.shape, hashlib.sha256(stored.read()).hexdigest())
    return found


def lineage_of(adapter: Adapter) -> tuple[Node, ...]:
    """Return an adapter's node and its ancestors; one that was not made by Ferry has none that is known."""
    if adapter.manifest is not None:
        return adapter.manifest.ancestry()
    read = Manifest(kind=KIND, name="", verb="", summary="", tensors=adapter_digests(adapter))
    name = adapter.directory.resolve().name
    return (Node(read.id, KIND, name, "", "came without a manifest", "", read.model_sha256),)
