"""The two paths that every conversion needs."""

from __future__ import annotations

from pathlib import Path

from ferry.core.errors import ConfigError
from ferry.verbs.convert.config import ConvertConfig

SPELLINGS = {"source": "SOURCE or --load-dir", "target": "TARGET, --output or --save-dir"}


def source_and_target(config: ConvertConfig) -> tuple[Path, Path]:
    """Return both paths, or say which is missing and how the manual and Ferry spell it."""
    if config.source is None or config.target is None:
        missing = "source" if config.source is None else "target"
        raise ConfigError(
            f"{missing} is missing",
            code="convert.missing-path",
            repair=f"give {SPELLINGS[missing]}, or the variables ORIGINAL_HF_WEIGHT, CONVERT_MODEL_PATH, "
            "MODEL_SAVE_PATH with a direction (hf2mg or mg2hf)",
        )
    return config.source, config.target
