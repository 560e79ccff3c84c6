"""`ferry convert`: prepare, carry, compare with what was promised, write the manifest, make it visible."""

from __future__ import annotations

from pathlib import Path

from ferry.core.carry import carry
from ferry.core.dtypes import num_bytes
from ferry.core.errors import IntegrityError
from ferry.core.manifest import MANIFEST_NAME, Manifest, Node
from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory
from ferry.core.verb import Result
from ferry.formats.checkpoint import Checkpoint, Draft
from ferry.formats.fingerprint import file_digests, manifest_of, tensor_digests
from ferry.formats.opening import check_archives
from ferry.verbs.convert.config import ConvertConfig
from ferry.verbs.convert.from_gguf import is_gguf, run_gguf
from ferry.verbs.convert.paths import source_and_target
from ferry.verbs.convert.plan import Prepared, describe, prepare


def run(config: ConvertConfig, reporter: Reporter) -> Result:
    """Convert and return where the result is, its fingerprint, and whether every digest agreed."""
    if is_gguf(config):
        return run_gguf(config, reporter)
    prepared = prepare(config)
    for choice in prepared.choices:
        reporter.event("choice", text=choice)
    promised = manifest_of(prepared.source.directory)
    if promised is None or not config.hash:
        _check_crcs(prepared.source, reporter)
    need_bytes = prepared.draft(prepared.target).num_bytes
    with StagedDirectory(prepared.target, need_bytes=need_bytes, overwrite=config.overwrite) as staged:
        draft = prepared.draft(staged.work)
        digests = _carry(prepared, draft, config, reporter)
        checked = compare(promised, digests, prepared.source) if config.hash else 0
        draft.write_small(staged.work)
        manifest = _manifest(prepared, draft, digests, promised, config, staged.work)
        (staged.work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        staged.commit()
    reporter.event("written", artifact=str(prepared.target), bytes=need_bytes, model_sha256=manifest.model_sha256)
    return {
        "artifact": str(prepared.target),
        "direction": prepared.direction,
        "family": prepared.source.model.family.name,
        "layout": draft.layout,
        "tensors": len(manifest.tensors),
        "files": len(manifest.files),
        "bytes": need_bytes,
        "model_sha256": manifest.model_sha256,
        "parent_model_sha256": promised.model_sha256 if promised else "",
        "same_as_parent": promised is not None and manifest.model_sha256 == promised.model_sha256 != "",
        "tensors_checked": checked,
        "restored": bool(draft.layout.get("restored")) and config.hash,
        "changes": list(prepared.changes),
        "choices": list(prepared.choices),
    }


def _check_crcs(source: Checkpoint, reporter: Reporter) -> None:
    """Where no digest is compared, the CRCs of torch files are all there is to check, so all are checked first."""
    total = sum(path.stat().st_size for path in source.payload_ranges())
    reporter.start("checking CRCs", total)
    count = check_archives(source)
    reporter.advance(total)
    reporter.finish()
    if count:
        reporter.event("checked", what="CRC-32 of every storage", archives=count)


def _carry(prepared: Prepared, draft: Draft, config: ConvertConfig, reporter: Reporter) -> dict[str, str]:
    total = sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in prepared.specs.values())
    reporter.start(f"carrying {len(prepared.specs)} tensors", total)
    digests = carry(
        prepared.specs,
        prepared.source.slots + (prepared.optimizer.slots if prepared.optimizer else ()),
        draft.files,
        reporter=reporter,
        digests=config.hash,
        transforms=prepared.transforms,
        threads=config.threads,
    )
    reporter.finish()
    return digests


def compare(promised: Manifest | None, digests: dict[str, str], source: Checkpoint) -> int:
    """Return how many tensors were found equal to the manifest; raise IntegrityError naming those that differ."""
    if promised is None:
        return 0
    differing = []
    checked = 0
    for name, tensor in promised.tensors.items():
        found = digests.get(f"{name} (source)", digests.get(name))
        if tensor.sha256 and found:
            checked += 1
            if found != tensor.sha256:
                differing.append(name)
    if differing:
        raise IntegrityError(
            f"{source.directory}: {len(differing)} of {checked} tensors differ from its manifest: "
            f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}",
            code="convert.source-damaged",
            repair="nothing was written; the source was changed or damaged after it was made: make or fetch it again",
        )
    return checked


def _manifest(
    prepared: Prepared,
    draft: Draft,
    digests: dict[str, str],
    promised: Manifest | None,
    config: ConvertConfig,
    directory: Path,
) -> Manifest:
    source, target = source_and_target(config)
    settings = config.model_dump(mode="json", exclude_defaults=True)
    settings |= {key: Path(value).name for key, value in settings.items() if isinstance(getattr(config, key), Path)}
    proofs = [{"check": "digest of every tensor read equals the parent's manifest", "parent": promised.id}] if (
        promised and config.hash
    ) else []  # fmt: skip
    optimizer = {}
    if prepared.optimizer is not None:
        optimizer = {"optimizer_sha256": {name: digests[name] for name in sorted(prepared.optimizer.specs)}}
    parents = promised.ancestry() if promised else (_outsider(prepared, digests),)
    return Manifest(
        kind={"hf": "hf-model"}.get(draft.format, f"{draft.format.replace('_', '-')}-checkpoint"),
        name=target.name,
        verb="convert",
        summary=f"{source.name} -> {draft.format}{describe(prepared.layout)}",
        config=settings,
        tensors=tensor_digests(prepared.source, digests),
        files=file_digests(directory, (slot for file in draft.files for slot in file.slots)),
        details={"family": prepared.source.model.family.name, "layout": draft.layout} | optimizer,
        changes=prepared.changes,
        proofs=tuple(proofs),
        parents=(parents[0].id,),
        lineage=parents,
    )


def _outsider(prepared: Prepared, digests: dict[str, str]) -> Node:
    """Return a node for a source without a manifest: all that is known of it is what was just read."""
    source = prepared.source
    before = {name: digests.get(f"{name} (source)", digests[name]) for name in source.specs()}
    read = Manifest(kind=source.format, name="", verb="", summary="", tensors=tensor_digests(source, before))
    return Node(read.id, source.format, source.directory.name, "", "came without a manifest", "", read.model_sha256)
