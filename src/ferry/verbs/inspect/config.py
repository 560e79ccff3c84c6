"""The options of `ferry inspect`."""

from __future__ import annotations

from pathlib import Path

from ferry.core.config import VerbConfig, option


class InspectConfig(VerbConfig):
    """Show what a model is. No weights are loaded."""

    path: Path = option(..., positional=True, help="Model directory, shard set or GGUF file.")
    tensors: bool = option(False, help="List every tensor with its dtype, shape and file.")
    hf_assets: Path | None = option(None, help="Model directory with the config, for shards that bring none.")
