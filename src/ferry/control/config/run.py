"""Resolves another verb's config exactly as that verb would, and does nothing with it."""

from __future__ import annotations

import os
from typing import Any

from ferry.control.config.config import ConfigConfig
from ferry.core.errors import ConfigError, did_you_mean
from ferry.core.progress import Reporter
from ferry.core.resolution import understand
from ferry.core.verb import Result, discover, load_config


def run(config: ConfigConfig, reporter: Reporter) -> Result:
    """Return the values of a verb with their origins, or its JSON schema."""
    verbs = discover()
    if config.verb not in verbs:
        near = did_you_mean(config.verb, list(verbs))
        raise ConfigError(f"unknown verb {config.verb!r}{near}", code="cli.unknown-verb", repair="see `ferry --help`")
    verb = verbs[config.verb]
    if config.action == "schema":
        return load_config(verb).model_json_schema()
    resolved = understand(verb, config.arguments, os.environ).resolved
    values = resolved.config.model_dump(mode="json")
    result: dict[str, Any] = {"verb": verb.name, "values": values}
    return {**result, "origins": resolved.origins} if config.origin else result
