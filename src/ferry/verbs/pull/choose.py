"""Which files of a repository make up the model: one copy of the weights, and everything that is not weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from ferry.core.errors import InputError
from ferry.core.manifest import TensorDigest

INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = (
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data",
    "*.gguf", "*.tflite", "*.mlmodel", "consolidated*", "original/*", "onnx/*", "openvino*", "coreml/*", "flax_model*",
)  # fmt: skip


class Chosen(NamedTuple):
    files: tuple[str, ...]
    reason: str


def choose(names: Sequence[str], where: str) -> Chosen:
    """Return the files to bring: safetensors if there are any, else torch's `.bin`; never the same weights twice."""
    visible = sorted(name for name in names if not any(part.startswith(".") for part in Path(name).parts))
    visible = [name for name in visible if name != "ferry.json"]
    if "config.json" not in visible:
        raise InputError(
            f"{where} has no config.json: it is not a Hugging Face model",
            code="pull.no-config",
            repair=_repair(visible),
        )
    roots = [name for name in visible if "/" not in name]
    safetensors = [name for name in roots if name.endswith(".safetensors") and not name.startswith("consolidated")]
    pickles = [name for name in roots if fnmatch(name, "pytorch_model*.bin")]
    weights = safetensors or pickles
    if not weights:
        raise InputError(
            f"{where} has no weights (*.safetensors or *.bin)", code="pull.no-weights", repair=_repair(visible)
        )
    kept = tuple(name for name in visible if name in weights or not _is_weights(name, pickles=not safetensors))
    skipped = len(visible) - len(kept)
    kind = "safetensors" if safetensors else "pickled .bin weights: nothing else is there, tensor hashes are left out"
    return Chosen(kept, f"{kind}; {skipped} files that hold the weights again are left" if skipped else kind)


def check_complete(directory: Path, tensors: Mapping[str, Mapping[str, TensorDigest]]) -> dict[str, TensorDigest]:
    """Return all tensors of the weight files (given by file name), after comparing them with the index."""
    merged: dict[str, TensorDigest] = {}
    for name, found in tensors.items():
        twice = sorted(set(merged) & set(found))
        if twice:
            raise InputError(f"tensor {twice[0]} is in {name} and in another file", code="pull.twice")
        merged |= found
    if not (directory / INDEX).is_file():
        return merged
    try:
        promised = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{INDEX} cannot be read: {error}", code="pull.index") from None
    stored = {tensor: name for name, found in tensors.items() for tensor in found}
    wrong = sorted(tensor for tensor in {*promised, *stored} if promised.get(tensor) != stored.get(tensor))
    if wrong:
        raise InputError(
            f"{INDEX} puts tensor {wrong[0]} into {promised.get(wrong[0])}, found it in {stored.get(wrong[0])} "
            f"({len(wrong)} such tensors)",
            code="pull.index",
            repair="the source is incomplete: fetch or copy it again",
        )
    return merged


def _is_weights(name: str, *, pickles: bool) -> bool:
    if pickles and fnmatch(name, "pytorch_model*.bin.index.json"):
        return False
    if "/" in name and name.endswith(".safetensors"):
        return True
    return name.endswith(".safetensors") or any(fnmatch(name, pattern) for pattern in OTHER_WEIGHTS)


def _repair(names: Sequence[str]) -> str:
    ggufs = [name for name in names if name.endswith(".gguf")]
    return f"it holds GGUF files: fetch {ggufs[0]} and pull that" if ggufs else "is it the right place?"
