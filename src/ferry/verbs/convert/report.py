"""The calm screen after a conversion."""

from __future__ import annotations

from ferry.core.units import size_text
from ferry.core.verb import Result


def report(result: Result) -> str:
    """Return what was made, and where the proof is."""
    lines = [
        f"{result['direction']}: {result['tensors']} tensors, {size_text(result['bytes'])} -> {result['artifact']}"
    ]
    if result["model_sha256"]:
        lines.append(f"model sha256  {result['model_sha256']}")
    if result["same_as_parent"]:
        lines.append(
            f"same model as its source: {result['tensors_checked']} of {result['tensors']} tensors bit for bit"
        )
    elif result["parent_model_sha256"] and result["model_sha256"]:
        lines.append("differs from its source as declared below")
    if result["restored"]:
        lines.append("weight files named, ordered and cut as in the original model")
    lines += [f"changed: {change}" for change in result["changes"]]
    lines += [f"note: {choice}" for choice in result["choices"] if choice not in result["changes"]]
    return "\n".join(lines)
