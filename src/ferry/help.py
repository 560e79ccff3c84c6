"""The help page of one verb, made from its config model."""

from __future__ import annotations

import textwrap
from inspect import cleandoc

from ferry.core.options import Option, options_of
from ferry.core.verb import Verb, load_config

WIDTH = 110


def verb_help(verb: Verb) -> str:
    """Return the page of `ferry VERB --help`."""
    config_class = load_config(verb)
    options = options_of(config_class, verb.name)
    places = [option for option in options if option.positional]
    # The first paragraph of a config's docstring says what the summary says.
    about = cleandoc(config_class.__doc__ or "").partition("\n\n")[2]
    parts = [
        f"usage: ferry {' '.join([verb.name, *(_place(option) for option in places), '[flags]'])}",
        verb.summary,
        about,
        _table("arguments (by place or by flag):", places),
        _table("flags:", [option for option in options if not option.positional]),
        _common(verb),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _place(option: Option) -> str:
    word = option.name.upper() + ("..." if option.kind == "list" else "")
    return word if option.required else f"[{word}]"


def _table(title: str, options: list[Option]) -> str:
    return "\n".join([title, *(_entry(option) for option in options)]) if options else ""


def _entry(option: Option) -> str:
    spellings = [option.short, *option.flags] if option.short else list(option.flags)
    head = ", ".join(spellings)
    head += f", --no-{option.flags[0][2:]}" if option.kind == "bool" else f" {option.metavar}"
    notes = [
        option.bound,
        option.unit,
        "required" if option.required else f"default {option.default}",
        f"env {', '.join(option.env[1:])}" if option.env[1:] else "",
    ]
    text = f"{option.help} [{'; '.join(note for note in notes if note)}]"
    body = textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return f"  {head}\n{body}"


def _common(verb: Verb) -> str:
    words = "--json, --quiet, --config FILE, --set KEY=VALUE"
    return f"flags of every verb (see ferry --help): {words}{', --dry-run' if verb.plan else ''}"
