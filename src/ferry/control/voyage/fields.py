"""A step's `with` as a layer of config, with the line each value came from."""

from __future__ import annotations

from typing import Any

from ferry.core.config import Layer
from ferry.core.options import options_of
from ferry.core.sources import from_text
from ferry.core.verb import Verb, load_config


def field_layer(verb: Verb, values: dict[str, Any], origin: str, origins: dict[str, str] | None = None) -> Layer:
    """Return the values as a layer; a list may be written `4,4,3,3` here too."""
    lists = {option.name: option for option in options_of(load_config(verb), verb.name) if option.kind == "list"}
    read = {
        name: from_text(lists[name], value) if name in lists and isinstance(value, str) else value
        for name, value in values.items()
    }
    return Layer(origin, read, origins or {})
