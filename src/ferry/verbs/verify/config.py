"""The options of `ferry verify`."""

from __future__ import annotations

from pathlib import Path

from ferry.core.config import VerbConfig, option


class VerifyConfig(VerbConfig):
    """Check every byte of an artifact against its manifest."""

    path: Path = option(..., positional=True, help="Artifact to check: a model directory or a shard set.")
    against: Path | None = option(None, help="Another model, in any layout, that must hold the same tensors.")
    hf_assets: Path | None = option(None, help="Model directory with the config, for shards that bring none.")
    threads: int = option(2, ge=1, le=64, help="Tensors read at the same time.")
