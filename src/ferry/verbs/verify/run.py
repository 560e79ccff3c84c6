"""`ferry verify`: every tensor hashed in canonical form, every copy compared, every other byte hashed by file.

What is covered: tensor payloads by the tensor digests, further copies of a tensor by comparison, padding by being zero,
and all other bytes of all files by the file digests. Nothing is left over.
"""

from __future__ import annotations

from ferry.core.carry import carry
from ferry.core.dtypes import ITEM_BYTES, num_bytes
from ferry.core.errors import IntegrityError
from ferry.core.layout import Slot
from ferry.core.manifest import MANIFEST_NAME, Manifest, TensorDigest
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import file_digests, manifest_of, tensor_digests
from ferry.formats.opening import check_archives, open_checkpoint, open_promised
from ferry.formats.peft import is_adapter
from ferry.verbs.verify.adapter import verify_adapter
from ferry.verbs.verify.config import VerifyConfig

SHOWN = 8


def run(config: VerifyConfig, reporter: Reporter) -> Result:
    """Verify and return what was found equal; raise IntegrityError with everything that is not."""
    if is_adapter(config.path):
        return verify_adapter(config, reporter)
    checkpoint = open_promised(config.path, config.hf_assets)
    manifest = manifest_of(checkpoint.directory)
    tensors = _read(checkpoint, config, reporter)
    problems: list[str] = []
    strangers: list[str] = []
    if manifest is not None:
        problems += compare_tensors(manifest.tensors, tensors, "its manifest")
        found_files, strangers = _compare_files(manifest, checkpoint)
        problems += found_files + _padding(checkpoint, manifest)
    else:
        problems += _crcs(checkpoint)
    against: Result = {}
    if config.against is not None:
        other = open_checkpoint(config.against, config.hf_assets)
        others = _read(other, config, reporter)
        differing = compare_tensors(others, tensors, str(config.against))
        problems += differing
        against = {"path": str(config.against), "format": other.format, "tensors": len(others), "same": not differing}
    for problem in problems:
        reporter.event("problem", text=problem)
    if problems:
        raise IntegrityError(
            f"{config.path}: {len(problems)} {'differences' if len(problems) > 1 else 'difference'}: "
            f"{'; '.join(problems[:SHOWN])}{' ...' if len(problems) > SHOWN else ''}",
            code="verify.differs",
            repair="make or fetch the artifact again; its parents are named by `ferry lineage`",
        )
    fingerprint = Manifest(kind="", name="", verb="", summary="", tensors=tensors).model_sha256
    reporter.event("verified", model_sha256=fingerprint, tensors=len(tensors))
    return {
        "path": str(config.path),
        "format": checkpoint.format,
        "verified": manifest is not None,
        "tensors": len(tensors),
        "files": len(manifest.files) if manifest else 0,
        "bytes": sum(path.stat().st_size for path in checkpoint.payload_ranges()),
        "model_sha256": fingerprint,
        "same": against.get("same"),
        "against": against,
        "changes": list(manifest.changes) if manifest else [],
        "strangers": strangers,
    }


def _read(checkpoint: Checkpoint, config: VerifyConfig, reporter: Reporter) -> dict[str, TensorDigest]:
    specs = checkpoint.specs()
    total = sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in specs.values())
    reporter.start(f"hashing {checkpoint.directory.name}", total)
    digests = carry(specs, checkpoint.slots, (), reporter=reporter, threads=config.threads)
    reporter.finish()
    return tensor_digests(checkpoint, digests)


def compare_tensors(expected: dict[str, TensorDigest], found: dict[str, TensorDigest], where: str) -> list[str]:
    """Return one line for every tensor that is missing, extra, or different."""
    lines = [f"tensor {name} is missing (it is in {where})" for name in expected if name not in found]
    lines += [f"tensor {name} is not in {where}" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name in found and tensor.sha256 and found[name] != tensor:
            lines.append(f"tensor {name} differs from {where}")
    return lines


def _compare_files(manifest: Manifest, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Return what differs, and the files that the manifest does not know."""
    found = file_digests(checkpoint.directory, checkpoint.slots)
    lines = [f"file {name} is missing" for name in manifest.files if name not in found]
    for name, digest in manifest.files.items():
        if name in found and found[name] != digest:
            what = "the part outside its tensors" if digest.covers == "envelope" else "it"
            size = f" ({found[name].num_bytes} bytes, expected {digest.num_bytes})"
            lines.append(f"file {name}: {what} differs{size if found[name].num_bytes != digest.num_bytes else ''}")
    return lines, [name for name in found if name not in manifest.files and name != MANIFEST_NAME]


def _padding(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """Padding rows that were written as zeros must still be zeros."""
    if manifest.details.get("layout", {}).get("pad_rows") != "zeros":
        return []
    return [
        f"padding of {slot.label} in {slot.path.parent.name}/{slot.path.name} is not zero"
        for slot in checkpoint.slots
        if slot.local.pad_rows and any(_pad_bytes(slot))
    ]


def _pad_bytes(slot: Slot) -> bytes:
    row_bytes = slot.local.cols * ITEM_BYTES[slot.dtype]
    with open(slot.path, "rb") as file:
        file.seek(slot.offset + (slot.local.rows - slot.local.pad_rows) * row_bytes)
        return file.read(slot.local.pad_rows * row_bytes)


def _crcs(checkpoint: Checkpoint) -> list[str]:
    """Without a manifest, the CRCs that torch containers bring are all there is to check."""
    try:
        check_archives(checkpoint)
    except IntegrityError as error:
        return [error.message]
    return []
