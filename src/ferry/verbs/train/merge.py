"""Puts a LoRA adapter into its base: a complete Hugging Face model, carried window by window like a conversion.

W + scale * B @ A is computed in float32 and rounded once to the dtype of W, ties to even; every other tensor and file
is carried bit for bit. Needs no torch, and memory for the matrices of a few modules. Base and adapter are only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ferry.core.carry import Spec, carry
from ferry.core.dtypes import num_bytes
from ferry.core.errors import InputError, IntegrityError
from ferry.core.floats import FLOATS, Bytes, from_float32, to_float32
from ferry.core.manifest import MANIFEST_NAME, Manifest, Node
from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory, check_apart, check_target
from ferry.core.verb import Result
from ferry.formats import peft
from ferry.formats.checkpoint import Checkpoint, Draft
from ferry.formats.fingerprint import damaged_files, file_digests, manifest_of, tensor_digests
from ferry.formats.hf_write import draft_hf
from ferry.formats.opening import check_archives, open_checkpoint
from ferry.formats.peft import Adapter, Factors, check_base, check_fits, check_intact, shortened
from ferry.formats.peft_targets import short_targets
from ferry.formats.peft_write import Base, base_of, lineage_of

MAX_SHARD_BYTES = 5_000_000_000
"""Size of the weight files, where the base does not bring its own (Megatron shards without headers)."""


@dataclass(frozen=True)
class Merge:
    """A merge with everything checked that can be checked from headers and manifests."""

    source: Checkpoint
    specs: dict[str, Spec]
    adapter: Adapter
    changes: tuple[str, ...]

    def draft(self, directory: Path) -> Draft:
        return draft_hf(self.source, self.specs, directory, MAX_SHARD_BYTES)


def merge(
    base: Path, adapter: Path, target: Path, reporter: Reporter, *, overwrite: bool = False, threads: int = 2
) -> Result:
    """Write base + adapter as a Hugging Face model directory; return where it is and what was changed."""
    merging = prepare(base, adapter)
    check_apart(target, base, adapter)
    check_target(target, overwrite=overwrite)
    check_intact(merging.adapter)
    if manifest_of(base) is None:
        check_archives(merging.source)
    known = base_of(merging.source, reporter, threads)
    check_base(merging.adapter, known.model_sha256, str(base))
    for text in (*merging.changes, *_notes(merging.adapter)):
        reporter.event("choice", text=text)
    need_bytes = merging.draft(target).num_bytes
    with StagedDirectory(target, need_bytes=need_bytes, overwrite=overwrite) as staged:
        draft = merging.draft(staged.work)
        digests = _carry(merging, draft, reporter, threads)
        _compare(known, digests, base)
        draft.write_small(staged.work)
        manifest = _manifest(merging, draft, digests, known, staged)
        (staged.work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        staged.commit()
    reporter.event("written", artifact=str(target), bytes=need_bytes, model_sha256=manifest.model_sha256)
    return {
        "artifact": str(target),
        "family": merging.source.model.family.name,
        "tensors": len(manifest.tensors),
        "merged_tensors": len(merging.adapter.modules),
        "bytes": need_bytes,
        "model_sha256": manifest.model_sha256,
        "base_model_sha256": known.model_sha256,
        "base_checked": bool(merging.adapter.base_sha256),
        "changes": list(manifest.changes),
    }


def prepare(base: Path, adapter: Path) -> Merge:
    """Open both, and refuse what cannot be merged, from headers and manifests alone. Writes nothing."""
    source = open_checkpoint(base)
    opened = peft.named_for(peft.open_adapter(adapter), source.model)
    promised = manifest_of(base)
    if promised is not None and promised.model_sha256:
        check_base(opened, promised.model_sha256, str(base))
    check_fits(opened, source.model, str(base))
    specs = source.specs()
    for module in opened.modules:
        dtype = specs[f"{module}.weight"].dtype
        if dtype not in FLOATS:
            raise InputError(f"{base}: {module}.weight is {dtype}, expected {' or '.join(FLOATS)}", code="lora.dtype")
    altered = damaged_files(base, promised) if promised is not None else []
    changes = [f"{name}: changed since the base was made" for name in altered]
    return Merge(source, specs, opened, (_declared(source, opened), *changes))


class Delta:
    """The change of one weight, as the carrier asks for it: windows of whole rows, from the first row to the last."""

    def __init__(self, adapter: Adapter, module: str) -> None:
        self._adapter, self._module = adapter, module
        self._row = 0
        self._factors: Factors | None = None

    def __call__(self, window: Bytes, dtype: str) -> Bytes:
        if self._factors is None:
            self._factors = self._adapter.read(self._module)
        a_RI, b_OR = self._factors
        rows = slice(self._row, self._row + len(window))
        scale = np.float32(self._adapter.scale(self._module))
        with np.errstate(over="ignore", invalid="ignore"):
            merged = from_float32(to_float32(window, dtype) + scale * (b_OR[rows] @ a_RI), dtype)
        if not np.isfinite(to_float32(merged, dtype)).all():
            raise InputError(
                f"{self._module} + {self._adapter.directory} has values that are not finite in {dtype} "
                f"(rows {rows.start} to {rows.stop - 1})",
                code="lora.overflow",
                repair="the adapter is damaged or its training diverged: take an earlier checkpoint",
            )
        self._row = rows.stop
        if self._row == len(b_OR):
            self._factors = None
        return merged


def _carry(merging: Merge, draft: Draft, reporter: Reporter, threads: int) -> dict[str, str]:
    total = sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in merging.specs.values())
    reporter.start(f"merging into {len(merging.adapter.modules)} of {len(merging.specs)} tensors", total)
    digests = carry(
        merging.specs,
        merging.source.slots,
        draft.files,
        reporter=reporter,
        transforms={f"{module}.weight": Delta(merging.adapter, module) for module in merging.adapter.modules},
        threads=threads,
    )
    reporter.finish()
    return digests


def _notes(adapter: Adapter) -> list[str]:
    if adapter.base_sha256:
        return []
    return [f"{adapter.directory.name} does not say which model it was trained on: only names and shapes were compared"]


def _declared(source: Checkpoint, adapter: Adapter) -> str:
    ends = short_targets(source.model, list(adapter.modules))
    return (
        f"LoRA merged into {len(adapter.modules)} weights ({shortened(ends, 8)}): W + scale x B A in float32, rounded "
        "once to nearest even"
    )


def _compare(known: Base, digests: Mapping[str, str], base: Path) -> None:
    """Refuse a base whose tensors are not those of its fingerprint: damaged, or changed while it was read."""
    read = {name: digests.get(f"{name} (source)", digests.get(name, "")) for name in known.tensors}
    differing = [name for name, tensor in known.tensors.items() if read[name] not in ("", tensor.sha256)]
    if differing:
        raise IntegrityError(
            f"{base}: {len(differing)} of {len(known.tensors)} tensors are not what its manifest says: "
            f"{shortened(differing)}",
            code="lora.base-damaged",
            repair="nothing was written; make or fetch the base again",
        )


def _manifest(merging: Merge, draft: Draft, digests: dict[str, str], known: Base, staged: StagedDirectory) -> Manifest:
    trained = lineage_of(merging.adapter)
    ancestors: dict[str, Node] = {node.id: node for node in (*known.lineage, *trained)}
    return Manifest(
        kind="hf-model",
        name=staged.target.name,
        verb="train",
        summary=f"{known.name} + {merging.adapter.directory.resolve().name}, merged",
        config={"base": known.name, "adapter": merging.adapter.directory.resolve().name},
        tensors=tensor_digests(merging.source, digests),
        files=file_digests(staged.work, (slot for file in draft.files for slot in file.slots)),
        details={"family": merging.source.model.family.name, "layout": draft.layout},
        changes=merging.changes,
        parents=(known.lineage[0].id, trained[0].id),
        lineage=tuple(ancestors.values()),
    )
