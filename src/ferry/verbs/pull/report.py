"""The calm screen of `ferry pull`."""

from __future__ import annotations

from ferry.core.units import size_text
from ferry.core.verb import Result


def report(result: Result) -> str:
    head = "already there" if result["already_there"] else "pulled"
    lines = [f"{head}: {result['artifact']}", "", f"  from      {result['source']}"]
    lines += [f"            {choice}" for choice in result["choices"]]
    lines.append(f"  holds     {size_text(result['bytes'])} in {result['files']} files, {result['tensors']} tensors")
    lines.append(f"  sha256    {result['model_sha256'] or 'not taken of pickled weights'}")
    lines.append(f"  proof     {result['artifact']}/ferry.json")
    return "\n".join(lines) + "\n"
