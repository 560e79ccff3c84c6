"""Options as words of the command line, for tests that start the real command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Return options as flags; structures are set field by field."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            for key, inner in value.items():
                words += ["--set", f"{name}.{key}={json.dumps(inner) if not isinstance(inner, str) else inner}"]
        elif isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words
