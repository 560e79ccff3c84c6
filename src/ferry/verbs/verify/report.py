"""The calm screen after a verification."""

from __future__ import annotations

from ferry.core.units import size_text
from ferry.core.verb import Result


def report(result: Result) -> str:
    """Return what was found equal, and to what."""
    size = f"{size_text(result['bytes'])} of weights"
    if result["verified"]:
        lines = [f"verified: {result['tensors']} tensors in {result['files']} files, {size}, as its manifest says"]
    else:
        lines = [f"read: {result['tensors']} tensors, {size}; there is no manifest to compare with"]
    lines.append(f"model sha256  {result['model_sha256']}")
    if result["against"]:
        lines.append(f"same model as {result['against']['path']}: every tensor bit for bit")
    lines += [f"declared change: {change}" for change in result["changes"]]
    if result["strangers"]:
        lines.append(f"not in the manifest, not checked: {', '.join(result['strangers'])}")
    return "\n".join(lines)
