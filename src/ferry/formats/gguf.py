"""A GGUF file as a complete Hugging Face directory: config, tokenizer, chat template, weights in bfloat16.

`gguf_plan` reads only the header and refuses what cannot be carried; `GgufModel.write` streams the weights, a block of
rows at a time, so its memory does not grow with the model. Quantized values are computed in float32 by the `gguf`
package's own formulas and rounded to the nearest bfloat16, ties to even.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ferry.core.dtypes import num_items
from ferry.core.errors import InputError
from ferry.core.manifest import TensorDigest
from ferry.core.progress import Reporter
from ferry.core.safetensors import Header, make_header
from ferry.formats.gguf_config import architecture_of, generation_config, model_config, tensor_names
from ferry.formats.gguf_file import GgufFile, GgufTensor, import_gguf, read_gguf, row_sizes
from ferry.formats.gguf_tokenizer import tokenizer_assets

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WEIGHTS = "model.safetensors"
BLOCK_VALUES = 1 << 18  # 1 MiB of float32: dequantization makes several temporaries of this size


@dataclass(frozen=True)
class GgufModel:
    """A model that can be written in Hugging Face form. Nothing of its weights has been read yet."""

    file: GgufFile
    config: dict[str, Any]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(Hugging Face name, dtype, shape), in the order of `model.safetensors`."""
    assets: dict[str, bytes]
    """Every other file, by name."""
    source: str
    """What was read, in words: architecture, types of the tensors."""
    names: dict[str, str]
    """Hugging Face name -> GGUF name."""
    rotates_pairs: bool

    @property
    def header(self) -> Header:
        return make_header(self.tensors, {"format": "pt"})

    @property
    def write_bytes(self) -> int:
        return self.header.file_bytes + sum(len(asset) for asset in self.assets.values())

    def write(self, directory: Path, reporter: Reporter) -> dict[str, TensorDigest]:
        """Write every file into an existing directory and return the digest of every tensor."""
        for name, asset in self.assets.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(asset)
        header = self.header
        digests = {}
        reporter.start(f"reading {self.file.path.name}", header.file_bytes - header.data_start)
        with open(self.file.path, "rb") as source, open(directory / WEIGHTS, "wb") as target:
            target.write(header.raw)
            for name, dtype, shape in self.tensors:
                sha256 = hashlib.sha256()
                for block in self._blocks(source, name):
                    sha256.update(block)
                    target.write(block)
                    reporter.advance(len(block))
                digests[name] = TensorDigest(dtype, shape, sha256.hexdigest())
        reporter.finish()
        return digests

    def _blocks(self, source: BinaryIO, name: str) -> Iterator[bytes]:
        """Yield the bfloat16 bytes of one tensor, a block of rows at a time."""
        tensor = self.file.tensors[self.names[name]]
        head_dim = self.config["head_dim"]
        is_permuted = self.rotates_pairs and any(part in name for part in (".q_proj.", ".k_proj."))
        step = head_dim if is_permuted and len(tensor.shape) > 1 else 1  # a head is permuted as a whole
        for values in dequantized_rows(source, tensor, step):
            yield to_bfloat16(halves_from_pairs(values, head_dim) if is_permuted else values)


def gguf_plan(path: Path, tokenizer: Path | None = None) -> GgufModel:
    """Read a GGUF file's header. `tokenizer` is a directory to take the tokenizer from instead of the file."""
    file = read_gguf(path)
    architecture = architecture_of(file)
    names = tensor_names(file)
    config = model_config(file)
    tensors = tuple((name, "BF16", file.tensors[names[name]].shape) for name in sorted(names))
    _check_types(file)
    _check_shapes(file, config, {name: shape for name, _, shape in tensors})
    assets = {"config.json": _json(config), "generation_config.json": _json(generation_config(file))}
    assets |= tokenizer_assets(file, tokenizer)
    return GgufModel(file, config, tensors, assets, _source(file), names, architecture.rotates_pairs)


def dequantized_rows(source: BinaryIO, tensor: GgufTensor, step: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield float32 blocks of whole rows; the number of rows is a multiple of `step`."""
    import numpy as np

    gguf = import_gguf()
    ggml_type = gguf.GGMLQuantizationType(tensor.type)
    row_values = tensor.shape[-1]
    num_rows = num_items(tensor.shape) // row_values
    block_values, block_bytes = row_sizes(tensor.type)
    row_bytes = row_values // block_values * block_bytes
    rows_at_once = max(1, BLOCK_VALUES // row_values // step) * step
    source.seek(tensor.start)
    for first in range(0, num_rows, rows_at_once):
        rows = min(rows_at_once, num_rows - first)
        raw = np.frombuffer(source.read(rows * row_bytes), np.uint8).reshape(rows, row_bytes)
        values: npt.NDArray[np.float32] = gguf.dequantize(_typed(raw, ggml_type.name), ggml_type)
        yield values.astype(np.float32, copy=False).reshape(rows, row_values)


def halves_from_pairs(values: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's reordering of q and k: within a head, rows (0, h), (1, h+1), .. become 0, 1, .., h, h+1, .."""
    is_bias = values.shape[0] == 1
    pairs = values.reshape(-1, head_dim // 2, 2, 1 if is_bias else values.shape[1])
    halves: npt.NDArray[np.float32] = pairs.swapaxes(1, 2)
    return halves


def to_bfloat16(values: npt.NDArray[np.float32]) -> bytes:
    """Return the bytes of the nearest bfloat16 of each value, ties to even; a NaN stays a NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        rounded[is_nan] = (bits[is_nan] >> np.uint32(16)) | np.uint32(0x40)
    data: bytes = rounded.astype("<u2").tobytes()
    return data


def _typed(raw: npt.NDArray[np.uint8], type_name: str) -> npt.NDArray[Any]:
    """The gguf package takes plain floats as floats and everything else as bytes."""
    return raw.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(type_name, "u1"))


def _check_types(file: GgufFile) -> None:
    import numpy as np

    gguf = import_gguf()
    for ggml_type in sorted({tensor.type for tensor in file.tensors.values()}):
        kind = gguf.GGMLQuantizationType(ggml_type)
        block = np.zeros((1, row_sizes(ggml_type)[1]), np.uint8)
        try:
            gguf.dequantize(_typed(block, kind.name), kind)
        except NotImplementedError:
            raise InputError(
                f"{file.path} has tensors of type {kind.name}, which the gguf package cannot dequantize",
                code="gguf.type",
                repair="pull another file of this model, for instance Q8_0 or F16",
            ) from None


def _check_shapes(file: GgufFile, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a file whose metadata and tensors disagree."""
    hidden = config["hidden_size"]
    q_rows, kv_rows = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    expected = {"q_proj": (q_rows, hidden), "k_proj": (kv_rows, hidden), "v_proj": (kv_rows, hidden)}
    expected |= {"o_proj": (hidden, q_rows), "down_proj": (hidden, config["intermediate_size"])}
    expected |= dict.fromkeys(("gate_proj", "up_proj"), (config["intermediate_size"], hidden))
    expected |= dict.fromkeys(("embed_tokens", "lm_head"), (config["vocab_size"], hidden))
    for name, shape in shapes.items():
        part, kind = name.split(".")[-2:]
        wanted = expected.get(part, shape)
        if shape != (wanted[:1] if kind == "bias" else wanted):
            raise InputError(
                f"{file.path}: tensor {name} has shape {shape}, its metadata says {wanted}", code="gguf.shape"
            )


def _source(file: GgufFile) -> str:
    gguf = import_gguf()
    num_by_type: dict[str, int] = {}
    for tensor in file.tensors.values():
        name = gguf.GGMLQuantizationType(tensor.type).name
        num_by_type[name] = num_by_type.get(name, 0) + 1
    types = ", ".join(f"{count} {name}" for name, count in sorted(num_by_type.items(), key=lambda item: -item[1]))
    return f"GGUF {file.metadata['general.architecture']}, {len(file.tensors)} tensors: {types}"


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
