"""What a model's files say about it before any of it is loaded: config.json, headers of weight files, GGUF metadata.

Any causal model of transformers is described, whether Ferry has a family for it or not. Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ferry.core.dtypes import ITEM_BYTES
from ferry.core.errors import InputError
from ferry.families.registry import read_config

LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length",
    "max_seq_length", "seq_len", "n_ctx",
)  # fmt: skip
"""Where a config.json may say how long a text can be. The smallest one counts."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
HALF = 2
SCHEMES = {"smoothquant": "W8A8", "w8a8": "W8A8", "awq": "W4A16", "compressed-tensors": "", "ascend": ""}
"""What a word for quantization says of a model; "" = the word is the name of its format."""


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it. 0 and "" stand for what they do not say."""

    path: Path
    model_type: str
    architecture: str = ""
    is_gguf: bool = False
    dtype: str = ""
    """Of its float weights."""
    format: str = ""
    """How it is quantized on disk: compressed-tensors, awq, ascend or another word; "" = float."""
    scheme: str = ""
    """W8A8 or W4A16, where Ferry knows the format."""
    activations: str = ""
    """What a scale of activations is for: `token` or `tensor`."""
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    hidden_size: int = 0
    vocab_size: int = 0
    is_tied: bool = False
    max_positions: int = 0
    """The longest text it was made for, its rope scaling included."""
    max_positions_from: str = ""
    """Where that number is from, in words."""
    rope: Mapping[str, Any] = field(default_factory=dict)
    """Its rope scaling, as it is written."""
    float_values: int = 0
    """Numbers that are stored as floats: all weights of a float model."""
    integer_bytes: int = 0
    """Bytes of weights that are stored as integers."""

    @property
    def described(self) -> str:
        """Say in a few words what it is."""
        how = " ".join(part for part in (self.format, self.scheme) if part) or self.dtype or "float"
        return f"{self.architecture or self.model_type or 'a model'}, {how}"

    def is_called(self, word: str) -> bool:
        """Say whether it is quantized as a word of `SCHEMES` says."""
        return bool(self.format) and (word == self.format or SCHEMES.get(word, "") == self.scheme != "")

    def weights_bytes(self, dtype: str, *, is_rounded: bool = False) -> int:
        """Return what the weights take with floats of a type; `is_rounded`: linear layers become 8-bit integers."""
        if not is_rounded:
            return self.integer_bytes + self.float_values * BYTES.get(dtype, HALF)
        kept = min(self.float_values, self.vocab_size * self.hidden_size * (1 if self.is_tied else 2))
        return self.integer_bytes + kept * BYTES.get(dtype, HALF) + self.float_values - kept

    def cache_bytes_per_token(self, dtype: str) -> int:
        """Return what keys and values of one token take, in all layers; 0 where the config does not say."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES.get(dtype, HALF)


def read_facts(model: Path) -> ModelFacts:
    """Describe a model directory or a GGUF file; raise InputError where there is no model."""
    if model.is_file() and model.suffix == ".gguf":
        return _of_gguf(model)
    if not model.is_dir():
        what = "is not a directory or a .gguf file" if model.exists() else "is not there"
        raise InputError(
            f"{model} {what}", code="input.missing", repair="`ferry pull NAME --output DIR` fetches a model"
        )
    return _of_directory(model)


def is_quantized(model: Path) -> bool:
    """Say whether a model's files say that it is quantized."""
    from ferry.formats.quantized import format_of

    return model.suffix == ".gguf" or bool(format_of(model))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that is about the decoder."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def longest(config: Mapping[str, Any]) -> tuple[int, str]:
    """Return how long a text may be after a config.json, and where that is from; (0, "") where it does not say."""
    found = {key: int(config[key]) for key in LENGTH_KEYS if isinstance(config.get(key), int) and config[key] > 0}
    if not found:
        return 0, ""
    key = min(found, key=lambda name: found[name])
    rope = rope_of(config)
    kind = rope.get("rope_type", rope.get("type", ""))
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or kind in ("llama3", "longrope", "su", "default", "proportional"):
        return found[key], f"{key} in config.json"
    original = rope.get("original_max_position_embeddings")
    if kind.endswith("yarn"):
        scaled = int(original * factor) if isinstance(original, int) else found[key]
    else:
        scaled = int(found[key] * factor)
    if scaled <= found[key]:
        return found[key], f"{key} in config.json"
    return scaled, f"{key} in config.json times the factor {factor:g} of its rope scaling"


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope scaling of a config.json, under its old or its new name; {} where there is none."""
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, dict):
            # With a scaling for each kind of layer: those of a kind are alike, and the longest-reaching counts.
            nested = [inner for inner in value.values() if isinstance(inner, dict)]
            found: dict[str, Any] = max(nested, key=lambda inner: inner.get("factor") or 0) if nested else value
            return dict(found)
    return {}


def _of_directory(directory: Path) -> ModelFacts:
    from ferry.formats.quantized import FORMATS, format_of

    document = read_config(directory / "config.json")
    config = text_config(document)
    name = format_of(directory)
    scheme = activations = ""
    if name in FORMATS:
        said = FORMATS[name].declared(directory, document).scheme
        scheme, activations = said.name, said.activations
    floats, integer_bytes, dtype = _weights(directory)
    num_positions, source = longest(config)
    heads = _size(config, "num_attention_heads", "n_head")
    hidden = _size(config, "hidden_size", "n_embd", "d_model")
    architectures = document.get("architectures")
    return ModelFacts(
        path=directory,
        model_type=str(document.get("model_type", "")),
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        dtype=dtype or str(config.get("dtype") or config.get("torch_dtype") or ""),
        format=name,
        scheme=scheme,
        activations=activations,
        num_layers=_size(config, "num_hidden_layers", "num_layers", "n_layer"),
        num_kv_heads=_kv_heads(config, heads),
        head_dim=_size(config, "head_dim", "kv_channels") or (hidden // heads if heads else 0),
        hidden_size=hidden,
        vocab_size=_size(config, "vocab_size", "padded_vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=num_positions,
        max_positions_from=source,
        rope=rope_of(config),
        float_values=floats,
        integer_bytes=integer_bytes,
    )


def _size(config: Mapping[str, Any], *keys: str) -> int:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), 0)


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("multi_query_attention"):
        return _size(config, "multi_query_group_num") or 1
    return _size(config, "num_key_value_heads") or heads


def _weights(directory: Path) -> tuple[int, int, str]:
    """Return how many values are floats, the bytes of the others, and the type of most floats."""
    from ferry.core.dtypes import num_items
    from ferry.core.safetensors import read_header

    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        files = [path for pattern in ("*.bin", "*.pt") for path in directory.glob(pattern)]
        if not files:
            raise InputError(
                f"{directory} has no weights (*.safetensors or *.bin)",
                code="hf.no-weights",
                repair="the download is incomplete: fetch it again",
            )
        return sum(path.stat().st_size for path in files) // HALF, 0, ""
    values: dict[str, int] = {}
    integer_bytes = 0
    for path in paths:
        for entry in read_header(path).tensors.values():
            if entry.dtype in DTYPES:
                values[entry.dtype] = values.get(entry.dtype, 0) + num_items(entry.shape)
            else:
                integer_bytes += entry.end - entry.start
    most = max(values, key=lambda name: values[name] * ITEM_BYTES[name]) if values else ""
    return sum(values.values()), integer_bytes, DTYPES.get(most, "")


def _of_gguf(path: Path) -> ModelFacts:
    from ferry.formats.gguf_file import read_gguf

    file = read_gguf(path)
    architecture = str(file.metadata.get("general.architecture", ""))

    def number(key: str, default: int = 0) -> int:
        value = file.metadata.get(f"{architecture}.{key}", default)
        return value if isinstance(value, int) else default

    heads = number("attention.head_count")
    hidden = number("embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    length = number("context_length")
    return ModelFacts(
        path=path,
        model_type=architecture,
        is_gguf=True,
        format="gguf",
        num_layers=number("block_count"),
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads if heads else 0),
        hidden_size=hidden,
        vocab_size=embedding.shape[0] if embedding else 0,
        max_positions=length,
        max_positions_from=f"{architecture}.context_length of the file" if length else "",
        integer_bytes=sum(tensor.num_bytes for tensor in file.tensors.values()),
    )
