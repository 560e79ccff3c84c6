"""What travels beside the shards, so that the way back needs no original model directory.

hf_assets/FILE                  config, tokenizer, chat template, remote code ... exactly as they were
hf_assets/.ferry/FILE.header    the raw header of each safetensors file the model came in
hf_assets/.ferry/carried.safetensors    tensors without a place in Megatron, if there are any
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ferry.core.errors import InputError
from ferry.core.family import HEAD, Model
from ferry.core.safetensors import make_header, parse_header, read_header
from ferry.formats.checkpoint import Assets
from ferry.formats.hf import find_assets

ASSETS = "hf_assets"
PRIVATE = f"{ASSETS}/.ferry"
CARRIED = "carried.safetensors"

Carried = Mapping[str, tuple[str, tuple[int, ...], bytes]]


class Kept(NamedTuple):
    """The assets beside a checkpoint, read again."""

    assets: Assets
    frames: dict[str, bytes]
    carried: dict[str, tuple[str, tuple[int, ...], bytes]]


def pack_assets(assets: Assets, frames: Mapping[str, bytes], carried: Carried) -> dict[str, bytes | Path]:
    """Return the small files to put beside shards: path -> bytes or a file to copy."""
    small: dict[str, bytes | Path] = {f"{ASSETS}/{name}": path for name, path in assets.files.items()}
    small |= {f"{PRIVATE}/{name}.header": raw for name, raw in frames.items()}
    if carried:
        header = make_header(((name, dtype, shape) for name, (dtype, shape, _) in carried.items()), {})
        small[f"{PRIVATE}/{CARRIED}"] = header.raw + b"".join(data for _, _, data in carried.values())
    return small


def read_assets(directory: Path, hf_directory: Path | None) -> Kept:
    """Return the assets beside a checkpoint, or those of the model directory the user names."""
    folder = directory / ASSETS
    if not (folder / "config.json").is_file():
        if hf_directory is None or not (hf_directory / "config.json").is_file():
            where = f"{hf_directory} has no config.json" if hf_directory else f"{directory} has no {ASSETS}/config.json"
            raise InputError(
                where,
                code="megatron.no-config",
                repair="give the original model directory with --hf-assets (or TOKENIZER_PATH): "
                "its config and tokenizer are needed",
            )
        return Kept(find_assets(hf_directory), {}, {})
    private = directory / PRIVATE
    frames = {path.name.removesuffix(".header"): path.read_bytes() for path in sorted(private.glob("*.header"))}
    return Kept(find_assets(folder), frames, _read_carried(private / CARRIED))


def tied_copies(model: Model, frames: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return the head's name if the model is tied and its original files stored the head nevertheless."""
    head = model.roles.get(HEAD)
    stored = {name for file, raw in frames.items() for name in parse_header(raw, file).tensors}
    return (head,) if model.dims.tied and isinstance(head, str) and head in stored else ()


def _read_carried(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    if not path.is_file():
        return {}
    data, header = path.read_bytes(), read_header(path)
    return {name: (entry.dtype, entry.shape, data[entry.start : entry.end]) for name, entry in header.tensors.items()}
