"""Opens whatever checkpoint a directory holds."""

from __future__ import annotations

from pathlib import Path

from ferry.core.errors import InputError
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.hf import is_hf, open_hf
from ferry.formats.megatron import is_megatron, open_megatron


def sniff(directory: Path) -> str:
    """Return the format of a directory or file: `hf`, `megatron`, `torch_dist` or `gguf`."""
    if directory.is_file() and directory.suffix == ".gguf":
        return "gguf"
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "is not there"
        raise InputError(f"{directory} {what}", code="input.missing")
    if is_megatron(directory):
        return "megatron"
    if is_hf(directory):
        return "hf"
    raise InputError(
        f"{directory} is neither a Hugging Face model (config.json) nor a Megatron checkpoint "
        "(latest_checkpointed_iteration.txt or mp_rank_*)",
        code="input.unknown-format",
        repair="`ls` it: is it the right directory?",
    )


def open_checkpoint(directory: Path, hf_assets: Path | None = None) -> Checkpoint:
    """Open a model directory or shard set by what it holds; headers only."""
    kind = sniff(directory)
    if kind == "megatron":
        return open_megatron(directory, hf_assets)
    if kind == "gguf":
        raise InputError(f"{directory} is a GGUF file", code="input.gguf", repair="`ferry convert gguf2hf` first")
    return open_hf(directory)
