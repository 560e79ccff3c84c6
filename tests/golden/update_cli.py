"""Prints or rewrites cli.txt, the frozen surface of the command line: `python tests/golden/update_cli.py`.

One line per option. A line that goes away or changes breaks someone's script; a new one is a promise for years.
"""

from __future__ import annotations

from pathlib import Path

from ferry.core.options import Option, options_of
from ferry.core.verb import discover, load_config

GOLDEN = Path(__file__).parent / "cli.txt"


def surface() -> str:
    """Return every verb and option, as text."""
    lines: list[str] = []
    for name, verb in sorted(discover().items()):
        lines.append(f"{name}{' (--dry-run)' if verb.plan else ''}")
        lines += [f"  {_line(option)}" for option in options_of(load_config(verb), name)]
    return "\n".join(lines) + "\n"


def _line(option: Option) -> str:
    parts = [" ".join(flag for flag in (*option.flags, option.short) if flag), option.type]
    parts.append("required" if option.required else f"default {option.default}")
    parts += [part for part in ("by place" if option.positional else "", " ".join(option.env[1:])) if part]
    return "; ".join(parts)


if __name__ == "__main__":
    GOLDEN.write_text(surface(), encoding="utf-8")
