"""`${...}` in a voyage file: values that come from the voyage, its variables, or the results of earlier steps.

A text that is one reference alone takes the value with its type; a reference inside a text is written into it. `$${` is
a plain `${`. Known words: `output`, `here` (the folder of the file), `python`, `name`, the file's own variables, and
`steps.NAME.field`, where fields of fields and items of lists are dotted too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ferry.core.errors import ConfigError, did_you_mean

REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")


def references_in(value: Any) -> Iterator[str]:
    """Yield the words of all references in a value, however deep."""
    if isinstance(value, str):
        yield from (found[1].strip() for found in REFERENCE.finditer(value) if found[1] is not None)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from references_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references_in(item)


def step_of(reference: str) -> str:
    """Return the step that a reference or the name in a gate needs, or ""."""
    root, _, rest = reference.partition(".")
    return rest.partition(".")[0] if root == "steps" else ""


def substitute(value: Any, look_up: Callable[[str], Any]) -> Any:
    """Return the value with every reference replaced."""
    if isinstance(value, str):
        return _text(value, look_up)
    if isinstance(value, Mapping):
        return {key: substitute(item, look_up) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [substitute(item, look_up) for item in value]
    return value


def _text(text: str, look_up: Callable[[str], Any]) -> Any:
    whole = REFERENCE.fullmatch(text)
    if whole and whole[1] is not None:
        return look_up(whole[1].strip())
    return REFERENCE.sub(lambda found: "${" if found[1] is None else str(look_up(found[1].strip())), text)


def find(names: Mapping[str, Any], dotted: str) -> Any:
    """Return what a dotted name stands for; raise ConfigError naming the part that is not there."""
    value: Any = names
    done = ""
    for part in dotted.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            keys = [str(key) for key in value] if isinstance(value, Mapping) else []
            holds = f"; it holds {', '.join(keys[:12])}" if done and keys else ""
            where = f"{done} has no {part!r}" if done else f"unknown name {part!r}"
            raise ConfigError(f"{where}{did_you_mean(part, keys)}{holds}", code="run.unknown-name")
        done = f"{done}.{part}" if done else part
    return value
