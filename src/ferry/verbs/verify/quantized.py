"""`ferry verify` of quantized weights: their stored tensors and files against their manifest.

A tensor is what is stored here (`weight_packed`, `weight_scale` ...): the float weights it came from are another
artifact. `--against` is another directory of quantized weights in the same format.
"""

from __future__ import annotations

from pathlib import Path

from ferry.core.carry import WINDOW_BYTES
from ferry.core.manifest import Manifest, TensorDigest
from ferry.core.plan import Plan
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.formats.fingerprint import content_id, manifest_of
from ferry.formats.opening import open_promised_quantized
from ferry.formats.quantized import QuantizedCheckpoint, format_of
from ferry.verbs.verify.comparing import compare_files, compare_tensors, hashed, refuse_problems
from ferry.verbs.verify.config import VerifyConfig

INTERPRETER_BYTES = 60_000_000


def is_quantized(path: Path) -> bool:
    return bool(format_of(path))


def plan_quantized(config: VerifyConfig) -> Plan:
    """Return what would be read; refuse what cannot be opened."""
    opened = {"path": open_promised_quantized(config.path)}
    if config.against is not None:
        opened["against"] = open_promised_quantized(config.against)
    against = f" and with {config.against}" if config.against else ""
    return Plan(
        verb="verify",
        summary=f"read {len(opened['path'].slots)} stored tensors and compare them with "
        + ("the manifest" if manifest_of(config.path) else "nothing: there is no manifest")
        + against,
        inputs={name: content_id(checkpoint) for name, checkpoint in opened.items()},
        read_bytes=sum(_weight_bytes(checkpoint) for checkpoint in opened.values()),
        memory_bytes=INTERPRETER_BYTES + config.threads * 4 * WINDOW_BYTES,
    )


def verify_quantized(config: VerifyConfig, reporter: Reporter) -> Result:
    """Verify stored tensors and files; raise IntegrityError with everything that is not as promised."""
    checkpoint = open_promised_quantized(config.path)
    manifest = manifest_of(config.path)
    tensors = _digests(checkpoint, config, reporter)
    problems: list[str] = []
    strangers: list[str] = []
    if manifest is not None:
        problems += compare_tensors(manifest.tensors, tensors, "its manifest")
        found_files, strangers = compare_files(manifest, checkpoint.directory, checkpoint.slots)
        problems += found_files
    against: Result = {}
    if config.against is not None:
        other = open_promised_quantized(config.against)
        others = _digests(other, config, reporter)
        differing = compare_tensors(others, tensors, str(config.against))
        problems += differing
        format_name = other.format.name
        against = {"path": str(config.against), "format": format_name, "tensors": len(others), "same": not differing}
    refuse_problems(config.path, problems, reporter)
    fingerprint = Manifest(kind="", name="", verb="", summary="", tensors=tensors).model_sha256
    reporter.event("verified", model_sha256=fingerprint, tensors=len(tensors))
    return {
        "path": str(config.path),
        "format": checkpoint.format.name,
        "verified": manifest is not None,
        "tensors": len(tensors),
        "files": len(manifest.files) if manifest else 0,
        "bytes": _weight_bytes(checkpoint),
        "model_sha256": fingerprint,
        "same": against.get("same"),
        "against": against,
        "changes": list(manifest.changes) if manifest else [],
        "strangers": strangers,
    }


def _digests(checkpoint: QuantizedCheckpoint, config: VerifyConfig, reporter: Reporter) -> dict[str, TensorDigest]:
    specs = checkpoint.specs()
    digests = hashed(checkpoint.directory.name, specs, checkpoint.slots, config.threads, reporter)
    found = checkpoint.found
    return {name: TensorDigest(found[name].dtype, found[name].shape, digests[name]) for name in sorted(digests)}


def _weight_bytes(checkpoint: QuantizedCheckpoint) -> int:
    return sum(path.stat().st_size for path in checkpoint.payload_ranges())
