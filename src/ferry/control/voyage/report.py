"""The calm screen after a voyage."""

from __future__ import annotations

from ferry.core.units import duration_text, size_text
from ferry.core.verb import Result

WORDS = {"done": "done", "skipped": "skipped, unchanged", "kept": "kept as it was"}


def report(result: Result) -> str:
    """Return the steps with what they cost, the gates, the verdict, and where the report is."""
    width = max((len(entry["name"]) for entry in result["steps"]), default=0)
    lines = []
    for entry in result["steps"]:
        size = size_text(entry["bytes"]) if entry["bytes"] else ""
        cost = duration_text(entry["seconds"]) if entry["status"] == "done" else ""
        lines.append(f"  {entry['name']:{width}}  {entry['kind']:8}  {cost:>8}  {size:>9}  {WORDS[entry['status']]}")
    lines += [f"  {name:{width}}  not made" for name in result["waiting"]]
    lines += ["", *(f"  gate holds: {gate['gate']}" for gate in result["gates"])]
    lines += ["", result["verdict"], f"report  {result['report']}"]
    return "\n".join(lines) + "\n"
