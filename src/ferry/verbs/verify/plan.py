"""What a verification would read."""

from __future__ import annotations

from ferry.core.carry import WINDOW_BYTES
from ferry.core.plan import Plan
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import content_id, manifest_of
from ferry.formats.opening import open_checkpoint, open_promised
from ferry.formats.peft import is_adapter
from ferry.verbs.verify.adapter import plan_adapter
from ferry.verbs.verify.config import VerifyConfig
from ferry.verbs.verify.quantized import is_quantized, plan_quantized

INTERPRETER_BYTES = 60_000_000


def plan(config: VerifyConfig) -> Plan:
    """Return what would be read; refuse what cannot be opened."""
    if is_adapter(config.path):
        return plan_adapter(config)
    if is_quantized(config.path):
        return plan_quantized(config)
    opened = [open_promised(config.path, config.hf_assets)]
    if config.against is not None:
        opened.append(open_checkpoint(config.against, config.hf_assets))
    names = ("path", "against")
    has_manifest = manifest_of(opened[0].directory) is not None
    return Plan(
        verb="verify",
        summary=f"read {len(opened[0].specs())} tensors and compare them with "
        + ("the manifest" if has_manifest else "nothing: there is no manifest")
        + (f" and with {config.against}" if config.against else ""),
        inputs={name: content_id(item) for name, item in zip(names, opened, strict=False)},
        read_bytes=sum(weight_bytes(item) for item in opened),
        memory_bytes=INTERPRETER_BYTES + config.threads * 4 * WINDOW_BYTES,
    )


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Return the size of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in checkpoint.payload_ranges())
