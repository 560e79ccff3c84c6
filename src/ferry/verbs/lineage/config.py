"""The options of `ferry lineage`."""

from __future__ import annotations

from pathlib import Path

from ferry.core.config import VerbConfig, option


class LineageConfig(VerbConfig):
    """Print how an artifact came to be."""

    path: Path = option(..., positional=True, help="Artifact whose ancestors to print.")
