"""From the last checkpoint of a run to what others load: a model, an adapter, shards. Needs no torch.

A checkpoint is slots of canonical tensors, so it is carried by the same code as any conversion. Masters are float32;
before they are carried they are rounded once to the dtypes the model came in, a file of slots for a file of slots.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.carry import carry
from ferry.core.dtypes import num_bytes
from ferry.core.errors import OutputError
from ferry.core.floats import Float32, from_float32
from ferry.core.gather import Sources
from ferry.core.layout import Slot, padded_vocabulary
from ferry.core.manifest import MANIFEST_NAME, Manifest
from ferry.core.progress import Reporter
from ferry.core.safetensors import make_header
from ferry.core.staging import StagedDirectory
from ferry.core.verb import Result
from ferry.formats import training
from ferry.formats.checkpoint import Checkpoint, Draft
from ferry.formats.fingerprint import file_digests, tensor_digests
from ferry.formats.hf_write import draft_hf
from ferry.formats.megatron_names import MegatronLayout
from ferry.formats.megatron_write import draft_megatron
from ferry.formats.opening import open_checkpoint
from ferry.formats.peft_write import Base, Making, base_of, new_config, write_adapter
from ferry.formats.training import TrainingState
from ferry.verbs.train import merge
from ferry.verbs.train.job import Job

MAX_SHARD_BYTES = 5_000_000_000
VOCAB_MULTIPLE = 128
ROUNDED = "rounded"


@dataclass(frozen=True)
class Trained:
    """A finished run, ready to be written in other forms."""

    job: Job
    source: Checkpoint
    base: Base
    state: TrainingState
    facts: Mapping[str, Any]
    """What the manifest says about the training, as JSON values."""


def export(job: Job, facts: Mapping[str, Any], reporter: Reporter) -> Result:
    """Write what the config asks for; return the artifacts by name, the main one as `artifact`."""
    assert job.config.model is not None
    steps = training.list_steps(job.checkpoints)
    state = training.verify(job.checkpoints / training.step_name(steps[0]))
    source = open_checkpoint(job.config.model)
    trained = Trained(job, source, base_of(source, reporter), state, facts)
    made: dict[str, Any] = {}
    if job.config.method == "lora":
        made["adapter"] = _export_adapter(trained)
        if job.config.merge:
            target = _cleared(job.output / "merged")
            made["merged"] = merge.merge(job.config.model, job.output / "adapter", target, reporter, overwrite=True)[
                "model_sha256"
            ]
    elif job.config.export != "none":
        made |= _export_weights(trained, reporter)
    main = next(iter(made), None)
    return {
        "artifact": str(job.output / main) if main else None,
        "model_sha256": made[main] if main else None,
        "artifacts": {name: {"path": str(job.output / name), "sha256": sha256} for name, sha256 in made.items()},
    }


def _export_adapter(trained: Trained) -> str:
    job, settings = trained.job, trained.job.config.lora
    tensors: dict[str, Float32] = {}
    with Sources(training.of_kind(trained.state.slots, "")) as sources:
        for name, local in sources.wholes().items():
            tensors[name] = sources.gather(local)[0].view(np.float32)
    config = new_config(
        trained.source.model, job.modules, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
        use_rslora=settings.rslora, base_name=trained.base.name,
    )  # fmt: skip
    making = Making(name="adapter", summary=_summary(trained), settings=dict(trained.facts))
    with StagedDirectory(_cleared(job.output / "adapter"), overwrite=True) as staged:
        manifest = write_adapter(staged.work, config, tensors, base=trained.base, making=making)
        staged.commit()
    return manifest.model_sha256


def _export_weights(trained: Trained, reporter: Reporter) -> dict[str, str]:
    """Write the model as Hugging Face directory and/or Megatron shards of the training's TP x PP."""
    job = trained.job
    folder = job.output / f".{ROUNDED}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made: dict[str, str] = {}
    try:
        slots = _round(trained, folder, reporter)
        rounded = replace(trained.source, slots=slots, tied_copies=trained.source.tied_copies)
        if job.config.export in ("hf", "both"):
            made["model"] = _write(trained, rounded, job.output / "model", None, reporter)
        if job.config.export in ("megatron", "both"):
            padded = padded_vocabulary(trained.source.model.dims.vocab_size, VOCAB_MULTIPLE, job.mesh.tp)
            layout = MegatronLayout(
                tp=job.mesh.tp, pp=job.mesh.pp, vpp=job.mesh.vpp, layer_list=job.config.layout.layer_list,
                padded_vocab=padded,
            )  # fmt: skip
            made["megatron"] = _write(trained, rounded, job.output / "megatron", layout, reporter)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return made


def _round(trained: Trained, folder: Path, reporter: Reporter) -> tuple[Slot, ...]:
    """Write every weight of the checkpoint in the dtype its canonical tensor came in; return the new slots."""
    dtypes = {name: spec.dtype for name, spec in trained.source.specs().items()}
    weights = training.of_kind(trained.state.slots, "")
    reporter.start("rounding masters", sum(num_bytes(slot.dtype, slot.local.shape) for slot in weights))
    rounded: list[Slot] = []
    for path in sorted({slot.path for slot in weights}):
        own = [slot for slot in weights if slot.path == path]
        triples = [
            (slot.label, dtypes[slot.local.pieces[0].name], slot.local.shape) for slot in own if slot.local.pieces
        ]
        header = make_header(triples, {})
        target = folder / path.name
        with open(path, "rb") as source, open(target, "wb") as file:
            file.write(header.raw)
            for slot in own:
                if not slot.local.pieces:
                    continue
                entry = header.tensors[slot.label]
                source.seek(slot.offset)
                size = num_bytes(slot.dtype, slot.local.shape)
                values = np.frombuffer(source.read(size), np.float32)
                file.write(from_float32(values, entry.dtype).data)
                rounded.append(Slot(target, entry.start, entry.dtype, slot.local, slot.label))
                reporter.advance(size)
    reporter.finish()
    return tuple(rounded)


def _write(
    trained: Trained, rounded: Checkpoint, target: Path, layout: MegatronLayout | None, reporter: Reporter
) -> str:
    specs = rounded.specs()

    def draft_in(directory: Path) -> Draft:
        if layout is None:
            return draft_hf(rounded, specs, directory, MAX_SHARD_BYTES)
        return draft_megatron(rounded, layout, directory, f"iter_{trained.state.step:07d}", VOCAB_MULTIPLE)

    with StagedDirectory(_cleared(target), need_bytes=draft_in(target).num_bytes, overwrite=True) as staged:
        draft = draft_in(staged.work)
        reporter.start(f"writing {target.name}", sum(num_bytes(s.dtype, (s.rows, s.cols)) for s in specs.values()))
        digests = carry(specs, rounded.slots, draft.files, reporter=reporter)
        reporter.finish()
        draft.write_small(staged.work)
        manifest = _manifest(trained, rounded, draft, digests, staged.work, target.name)
        (staged.work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        staged.commit()
    return manifest.model_sha256


def _manifest(
    trained: Trained, rounded: Checkpoint, draft: Draft, digests: dict[str, str], directory: Path, name: str
) -> Manifest:
    return Manifest(
        kind={"hf": "hf-model"}.get(draft.format, f"{draft.format}-checkpoint"),
        name=name,
        verb="train",
        summary=_summary(trained),
        config=dict(trained.facts),
        tensors=tensor_digests(rounded, digests),
        files=file_digests(directory, (slot for file in draft.files for slot in file.slots)),
        details={"family": rounded.model.family.name, "layout": draft.layout},
        changes=(f"trained: {_summary(trained)}; float32 masters rounded once to the base's dtypes",),
        parents=(trained.base.lineage[0].id,),
        lineage=trained.base.lineage,
    )


def _summary(trained: Trained) -> str:
    job = trained.job
    return f"{job.config.method}, {trained.state.step} steps of {job.global_batch} samples"


def _cleared(target: Path) -> Path:
    """Return a place for an artifact: one of this run is replaced once the new one is whole, anything else refused."""
    if target.exists() and not (target / MANIFEST_NAME).is_file():
        raise OutputError(f"{target} was not made by this run", code="output.exists", repair="remove it")
    return target
