"""Opens whatever checkpoint a directory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ferry.core.errors import FerryError, InputError, IntegrityError
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import damaged_files, manifest_of
from ferry.formats.hf import is_hf, open_hf
from ferry.formats.megatron import is_megatron, open_megatron
from ferry.formats.peft import is_adapter
from ferry.formats.quantized import QuantizedCheckpoint, format_of, known_format, open_quantized
from ferry.formats.torch_dist import archives, is_torch_dist, open_torch_dist
from ferry.formats.torch_zip import TorchArchive, check_crcs, open_torch

T = TypeVar("T")


def sniff(directory: Path) -> str:
    """Return the format of a directory or file: `hf`, `megatron`, `torch_dist`, `gguf`, `adapter` or `quantized`."""
    if directory.is_file() and directory.suffix == ".gguf":
        return "gguf"
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "is not there"
        raise InputError(f"{directory} {what}", code="input.missing")
    if is_torch_dist(directory):
        return "torch_dist"
    if is_megatron(directory):
        return "megatron"
    if is_hf(directory):
        return "quantized" if format_of(directory) else "hf"
    if is_adapter(directory):
        return "adapter"
    raise InputError(
        f"{directory} is neither a Hugging Face model (config.json) nor a Megatron checkpoint "
        "(latest_checkpointed_iteration.txt or mp_rank_*)",
        code="input.unknown-format",
        repair="`ls` it: is it the right directory?",
    )


def open_checkpoint(directory: Path, hf_assets: Path | None = None) -> Checkpoint:
    """Open a model directory or shard set by what it holds; headers only."""
    kind = sniff(directory)
    if kind == "torch_dist":
        return open_torch_dist(directory, hf_assets)
    if kind == "megatron":
        return open_megatron(directory, hf_assets)
    if kind == "adapter":
        raise InputError(
            f"{directory} is a LoRA adapter, expected a model",
            code="input.adapter",
            repair="`ferry train merge` puts it into its base",
        )
    if kind == "quantized":
        raise InputError(
            f"{directory} is quantized ({known_format(directory).name}), expected a float model",
            code="input.quantized",
            repair=f"`ferry quantize {directory} --dequantize --output OUT` gives a float model",
        )
    if kind == "gguf":
        raise InputError(f"{directory} is a GGUF file", code="input.gguf", repair="`ferry convert gguf2hf` first")
    return open_hf(directory)


def open_promised(directory: Path, hf_assets: Path | None = None) -> Checkpoint:
    """Open a checkpoint; where that fails, say first which files are not what the manifest promises."""
    return _promised(directory, lambda: open_checkpoint(directory, hf_assets))


def open_promised_quantized(directory: Path) -> QuantizedCheckpoint:
    """Open quantized weights; where that fails, say first which files are not what the manifest promises."""
    return _promised(directory, lambda: open_quantized(directory))


def _promised(directory: Path, opener: Callable[[], T]) -> T:
    try:
        return opener()
    except FerryError as error:
        manifest = manifest_of(directory)
        damaged = [] if manifest is None else damaged_files(directory, manifest)
        if not damaged:
            raise
        raise IntegrityError(
            f"{directory} cannot be opened ({error.message}); changed since it was made: {', '.join(damaged)}",
            code="verify.differs",
            repair="make or fetch the artifact again",
        ) from None


def check_archives(checkpoint: Checkpoint) -> int:
    """Check every CRC-32 of a checkpoint's torch archives (all that foreign files promise); return their number."""
    count = 0
    for archive in _archives(checkpoint):
        check_crcs(archive)
        count += 1
    return count


def _archives(checkpoint: Checkpoint) -> Iterator[TorchArchive]:
    if checkpoint.format == "torch_dist":
        yield from archives(checkpoint.directory)
    else:
        paths = checkpoint.payload_ranges()
        yield from (open_torch(path) for path in paths if path.suffix in (".pt", ".bin"))
