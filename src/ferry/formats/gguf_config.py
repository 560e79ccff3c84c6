"""What a GGUF file's metadata says about the model, in Hugging Face's words: `config.json`, `generation_config.json`
and the name of every tensor.

Each architecture is one row of a table. A file of an architecture that is not there, or with a tensor that its
architecture does not have, is refused: nothing is guessed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from ferry.core.errors import InputError
from ferry.formats.gguf_file import GgufFile


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is spelled in Hugging Face's words."""

    model_type: str
    class_name: str
    biases: tuple[str, ...] = ()
    """Parts that always have a bias."""
    qk_norm: bool = False
    rotates_pairs: bool = False
    """llama.cpp stores the rows of q and k so that rotary pairs are neighbours; Hugging Face keeps them in halves."""
    may_have_biases: bool = False
    """`attention_bias` and `mlp_bias` are options of the config."""


ARCHITECTURES = {
    # Mistral's files say llama as well; the mathematics is the same.
    "llama": Architecture("llama", "LlamaForCausalLM", rotates_pairs=True, may_have_biases=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", qk_norm=True),
}

ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: the factors of Llama 3's rope scaling, precomputed."""

LLAMA3_SCALINGS = [
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
]
"""The scalings of Llama 3.1 and 3.2. The file holds only their result, so they are recognised, not read."""


def architecture_of(file: GgufFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{file.path} has architecture {name!r}, expected one of {', '.join(ARCHITECTURES)}",
            code="gguf.architecture",
            repair="pull the model in Hugging Face form instead",
        )
    return ARCHITECTURES[name]


def tensor_names(file: GgufFile) -> dict[str, str]:
    """Return {hf name: gguf name} for every weight; raise InputError if one is missing or unknown."""
    architecture = architecture_of(file)
    expected = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if "output.weight" in file.tensors:
        expected["lm_head.weight"] = "output.weight"
    parts = {**NORMS, **ATTENTION, **MLP, **(QK_NORMS if architecture.qk_norm else {})}
    biases = architecture.biases + tuple(part for part in _optional_biases(file, architecture))
    for layer in range(_field(file, "block_count")):
        for part, hf_part in parts.items():
            expected[f"model.layers.{layer}.{hf_part}.weight"] = f"blk.{layer}.{part}.weight"
            if part in biases:
                expected[f"model.layers.{layer}.{hf_part}.bias"] = f"blk.{layer}.{part}.bias"
    missing = sorted(set(expected.values()) - set(file.tensors))
    unknown = sorted(set(file.tensors) - set(expected.values()) - {ROPE_FACTORS})
    for names, word in ((missing, "lacks"), (unknown, "has the unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{file.path} {word} tensor {', '.join(names[:3])}{more} for architecture {architecture.model_type}",
                code="gguf.tensors",
                repair="pull the model in Hugging Face form instead",
            )
    return expected


def model_config(file: GgufFile) -> dict[str, Any]:
    """Return the content of `config.json`."""
    architecture = architecture_of(file)
    num_heads = _field(file, "attention.head_count")
    hidden_size = _field(file, "embedding_length")
    head_dim = _field(file, "attention.key_length", _field(file, "rope.dimension_count", hidden_size // num_heads))
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": _field(file, "feed_forward_length"),
        "num_hidden_layers": _field(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _field(file, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shortest(_field(file, "attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(_field(file, "rope.freq_base", 10000.0)),
        "max_position_embeddings": _field(file, "context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "bfloat16",
        "use_cache": True,
    }
    scaling = _rope_scaling(file, config)
    if scaling:
        config["rope_scaling"] = scaling
    if architecture.may_have_biases:
        biases = _optional_biases(file, architecture)
        config["attention_bias"] = "attn_q" in biases
        config["mlp_bias"] = "ffn_up" in biases
    return config | _token_ids(file)


def generation_config(file: GgufFile) -> dict[str, Any]:
    """Return the content of `generation_config.json`: every token that ends a turn ends a generation."""
    ids = _token_ids(file)
    ends = [ids.get("eos_token_id"), *(file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    if unique:
        ids["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    return ids


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same 32-bit float: 9.999999747378752e-06 was written as 1e-05."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _field(file: GgufFile, key: str, default: Any = None) -> Any:
    name = f"{file.metadata['general.architecture']}.{key}"
    value = file.required(name) if default is None else file.metadata.get(name, default)
    if isinstance(value, list):  # one value per layer
        if len(set(value)) != 1:
            raise InputError(
                f"{file.path}: {name} differs between layers, which is not supported", code="gguf.metadata"
            )
        return value[0]
    return value


def _token_ids(file: GgufFile) -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "padding": "pad"}
    found = {hf: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key, hf in keys.items()}
    return {f"{name}_token_id": value for name, value in found.items() if value is not None}


def _optional_biases(file: GgufFile, architecture: Architecture) -> list[str]:
    """Return the parts that have a bias because this model's config says so: all of attention, all of the MLP."""
    if not architecture.may_have_biases:
        return []
    groups = [group for group in (ATTENTION, MLP) if any(f"blk.0.{part}.bias" in file.tensors for part in group)]
    return [part for group in groups for part in group]


def _rope_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    kind = _field(file, "rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _recognised_llama3(file, config)
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(_field(file, "rope.scaling.factor"))}
    if kind == "yarn":
        original = _field(file, "rope.scaling.original_context_length")
        factor = shortest(_field(file, "rope.scaling.factor"))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise InputError(f"{file.path} has the unknown rope scaling {kind!r}", code="gguf.rope")


def _recognised_llama3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    tensor = file.tensors[ROPE_FACTORS]
    with open(file.path, "rb") as data:
        data.seek(tensor.start)
        stored = struct.unpack(f"<{tensor.shape[0]}f", data.read(tensor.num_bytes))
    for scaling in LLAMA3_SCALINGS:
        computed = _llama3_factors(config["rope_theta"], config["head_dim"], scaling)
        if len(computed) == len(stored) and all(
            abs(ours - theirs) <= 1e-4 * ours for ours, theirs in zip(computed, stored, strict=True)
        ):
            return {"rope_type": "llama3", **scaling}
    raise InputError(
        f"{file.path} has rope factors that belong to none of the known Llama 3 scalings",
        code="gguf.rope",
        repair="pull the model in Hugging Face form instead",
    )


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, float]) -> list[float]:
    """Return by how much each rotary frequency is divided (llama.cpp's converter and transformers agree on this)."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * 3.141592653589793 * theta ** (pair / head_dim)
        turns = scaling["original_max_position_embeddings"] / wavelength
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
