"""`ferry verify`: every tensor hashed in canonical form, every copy compared, every other byte hashed by file.

What is covered: tensor payloads by the tensor digests, further copies of a tensor by comparison, padding by being zero,
and all other bytes of all files by the file digests. Nothing is left over.
"""

from __future__ import annotations

from ferry.core.dtypes import ITEM_BYTES
from ferry.core.errors import IntegrityError
from ferry.core.layout import Slot
from ferry.core.manifest import Manifest, TensorDigest
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import manifest_of, tensor_digests
from ferry.formats.opening import check_archives, open_checkpoint, open_promised
from ferry.formats.peft import is_adapter
from ferry.verbs.verify.adapter import verify_adapter
from ferry.verbs.verify.comparing import compare_files, compare_tensors, hashed, refuse_problems
from ferry.verbs.verify.config import VerifyConfig
from ferry.verbs.verify.quantized import is_quantized, verify_quantized


def run(config: VerifyConfig, reporter: Reporter) -> Result:
    """Verify and return what was found equal; raise IntegrityError with everything that is not."""
    if is_adapter(config.path):
        return verify_adapter(config, reporter)
    if is_quantized(config.path):
        return verify_quantized(config, reporter)
    checkpoint = open_promised(config.path, config.hf_assets)
    manifest = manifest_of(checkpoint.directory)
    tensors = _read(checkpoint, config, reporter)
    problems: list[str] = []
    strangers: list[str] = []
    if manifest is not None:
        problems += compare_tensors(manifest.tensors, tensors, "its manifest")
        found_files, strangers = compare_files(manifest, checkpoint.directory, checkpoint.slots)
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
    refuse_problems(config.path, problems, reporter)
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
    digests = hashed(checkpoint.directory.name, specs, checkpoint.slots, config.threads, reporter)
    return tensor_digests(checkpoint, digests)


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
