"""`ferry verify` of a LoRA adapter: its files and matrices against its manifest, and its base if one is given."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ferry.core.errors import IntegrityError
from ferry.core.plan import Plan
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.formats.fingerprint import manifest_of
from ferry.formats.opening import open_checkpoint
from ferry.formats.peft import Adapter, check_base, check_fits, check_intact, open_adapter
from ferry.formats.peft_write import adapter_digests
from ferry.verbs.verify.config import VerifyConfig


def plan_adapter(config: VerifyConfig) -> Plan:
    """Return what would be read; refuse what cannot be opened."""
    adapter = open_adapter(config.path)
    if config.against is not None:
        open_checkpoint(config.against)
    against = f", and with the base {config.against}" if config.against else ""
    return Plan(
        verb="verify",
        summary=f"read an adapter of {len(adapter.modules)} modules and compare it with "
        + ("the manifest" if adapter.manifest else "nothing: there is no manifest")
        + against,
        inputs={"path": adapter.manifest.id if adapter.manifest else str(config.path)},
        read_bytes=_num_bytes(adapter),
    )


def verify_adapter(config: VerifyConfig, reporter: Reporter) -> Result:
    """Verify an adapter; `--against` is then the model it should belong to."""
    adapter = open_adapter(config.path)
    check_intact(adapter)
    digests = adapter_digests(adapter)
    manifest = adapter.manifest
    differing = [name for name, found in digests.items() if manifest and manifest.tensors.get(name) != found]
    if differing:
        raise IntegrityError(
            f"{config.path}: {len(differing)} matrices differ from its manifest: {', '.join(differing[:5])}",
            code="verify.differs",
            repair="make or fetch the adapter again; its parents are named by `ferry lineage`",
        )
    same = _check_against(config.against, adapter) if config.against is not None else None
    fingerprint = (
        manifest.model_sha256 if manifest else hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
    )
    reporter.event("verified", model_sha256=fingerprint, tensors=len(digests))
    return {
        "path": str(config.path),
        "format": "adapter",
        "verified": manifest is not None,
        "tensors": len(digests),
        "files": len(manifest.files) if manifest else 0,
        "bytes": _num_bytes(adapter),
        "model_sha256": fingerprint,
        "same": same,
        "against": {},
        "changes": [],
        "strangers": [],
    }


def _check_against(base: Path, adapter: Adapter) -> bool:
    """Refuse another base than the adapter's; return whether it was known by its fingerprint."""
    checkpoint = open_checkpoint(base)
    check_fits(adapter, checkpoint.model, str(base))
    promised = manifest_of(base)
    if promised is not None and promised.model_sha256:
        check_base(adapter, promised.model_sha256, str(base))
    return bool(promised is not None and adapter.base_sha256)


def _num_bytes(adapter: Adapter) -> int:
    paths = {stored.path for pair in adapter.modules.values() for stored in pair}
    return sum(path.stat().st_size for path in paths)
