"""The calm screen of `ferry serve`, after its end."""

from __future__ import annotations

from ferry.core.units import duration_text
from ferry.core.verb import Result


def report(result: Result) -> str:
    """Return what a person reads."""
    by = f" by {result['stopped_by']}" if result["stopped_by"] else ""
    lines = [f"served: {result['model']} at {result['address']}", ""]
    lines.append(f"  stopped   {by.strip() or 'by its caller'} after {duration_text(result['seconds'])}")
    lines.append(f"  engine    {result['engine']}")
    lines.append(f"  answers   {result['answers']:,}, of them {result['guided_answers']:,} under a constraint")
    lines.append(f"  tokens    {result['prompt_tokens']:,} read, {result['generated_tokens']:,} written")
    if result["rejections"]:
        lines.append(f"  refused   {counted(result['rejections'], 'request')} that could not be let in")
    if result["cut_off"]:
        lines.append(f"  cut off   {counted(result['cut_off'], 'request')} not done in time")
    return "\n".join(lines) + "\n"


def counted(number: int, thing: str) -> str:
    """Return `1 request`, `2 requests`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
