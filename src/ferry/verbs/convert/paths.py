"""The two paths that every conversion needs, and that one does not destroy the other."""

from __future__ import annotations

from pathlib import Path

from ferry.core.errors import ConfigError, OutputError
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


def check_apart(target: Path, *inputs: Path | None) -> None:
    """Refuse a target that is, or holds, something to be read: with `overwrite` it would be removed."""
    for path in inputs:
        if path is not None and path.resolve().is_relative_to(target.resolve()):
            raise OutputError(
                f"{target} is, or holds, the source {path}", code="output.is-source", repair="choose another target"
            )
