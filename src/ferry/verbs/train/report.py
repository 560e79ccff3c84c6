"""The screen after `ferry train`: how it went, what was made, where the proof is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ferry.core.units import duration_text, size_text
from ferry.core.verb import Result

STOPPED_STATUS = 143
"""As of a process that ended by SIGTERM: the run was left early, and can be gone on with."""


def exit_status(result: Result) -> int:
    """Return the exit status of a run."""
    return STOPPED_STATUS if result.get("status") == "stopped" else 0


def report(result: Result) -> str:
    """Return the screen for people."""
    if result["action"] == "merge":
        return _merged(result)
    if result["action"] == "tokens":
        return f"wrote {result['samples']:,} samples, {result['tokens']:,} tokens: {', '.join(result['files'])}"
    if "summary" not in result:
        who = f"rank {result['rank']}" if "rank" in result else f"node {result['node']}"
        return f"{who}: {result['status']}; the first one writes the results"
    found: dict[str, Any] = result["summary"]
    head = "trained" if result["status"] == "done" else "stopped; run the same command again to go on"
    lines = [
        f"{head}: {found['num_steps']} of {result['steps']} steps, "
        f"loss {found['first_loss']:.4f} -> {found['last_loss']:.4f}",
        f"  {found['num_tokens']:,} tokens in {duration_text(found['train_s'])}, median "
        f"{found['median_tokens_per_s']:,.0f} tokens/s, padding {found['padding_share']:.1%}, peak "
        f"{size_text(found['peak_memory_bytes'])}",
    ]
    if result["validation_loss"] is not None:
        before = result["validation_perplexity_before"]
        was = f" (before {before:.3f})" if before is not None else ""
        lines.append(
            f"  validation loss {result['validation_loss']:.4f}, perplexity {result['validation_perplexity']:.3f}{was}"
        )
    if result["restarts"]:
        lines.append(f"  {len(result['restarts'])} restarts, each from the newest good checkpoint")
    for name, item in result.get("artifacts", {}).items():
        lines.append(f"  {name:8}  {item['path']}  sha256 {item['sha256'][:16]}")
    lines.append(f"  page      {Path(result['report'])}")
    return "\n".join(lines)


def _merged(result: Result) -> str:
    lines = [
        f"merged {result['merged_tensors']} of {result['tensors']} tensors -> {result['artifact']}",
        f"model sha256  {result['model_sha256']}",
    ]
    if not result["base_checked"]:
        lines.append("note: the adapter does not say which model it was trained on; only shapes were checked")
    return "\n".join(lines)
