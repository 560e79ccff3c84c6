"""What Megatron's command line would say about a model, derived from a Hugging Face config.

Written for the judge alone: nothing is shared with Ferry, so that two derivations can disagree. The names are the
fields of the `args` that Megatron-LM stores in a checkpoint; the judge builds its model from these fields, and can take
them from a shard instead, as `--use-checkpoint-args` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REQUIRED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "max_position_embeddings", "rotary_base", "norm_epsilon", "untie_embeddings_and_output_weights",
    "padded_vocab_size",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "group_query_attention": True, "add_bias_linear": False, "add_qkv_bias": False, "swiglu": True,
    "normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_interleaved": False,
    "use_rope_scaling": False, "rope_scaling_factor": 8.0, "qk_layernorm": False, "num_experts": None,
    "moe_ffn_hidden_size": None, "moe_router_topk": 2, "moe_router_pre_softmax": False, "moe_grouped_gemm": False,
    "moe_layer_freq": 1,
}  # fmt: skip


def from_hf(hf_dir: Path, tp: int, divisible_by: int) -> dict[str, Any]:
    config = json.loads((hf_dir / "config.json").read_text())
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    heads, model_type = config["num_attention_heads"], config["model_type"]
    multiple = divisible_by * tp
    fields: dict[str, Any] = dict(DEFAULTS)
    fields |= {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "norm_epsilon": config["rms_norm_eps"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "add_qkv_bias": bool(config.get("attention_bias", False)) or model_type == "qwen2",
        "qk_layernorm": model_type in ("qwen3", "qwen3_moe"),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        assert (rope["low_freq_factor"], rope["high_freq_factor"]) == (1.0, 4.0), "Megatron knows no other"
        assert rope["original_max_position_embeddings"] == 8192, "Megatron knows no other"
        fields |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    else:
        assert kind == "default", f"the judge cannot build rope type {kind}"
    if model_type == "glm":
        percent = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 0.5
        fields |= {"rotary_percent": percent, "rotary_interleaved": True}
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        fields |= {
            "num_experts": experts,
            "moe_ffn_hidden_size": config.get("moe_intermediate_size") or config["intermediate_size"],
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_router_pre_softmax": not config.get("norm_topk_prob", True),
        }
        assert not config.get("mlp_only_layers"), "the judge builds no mixed dense and expert layers"
    return fields


def from_args(args: Any) -> dict[str, Any]:
    """Return the fields a shard's `args` claims; raise if one that has no safe default is not there."""
    said = vars(args)
    missing = [name for name in REQUIRED if said.get(name) is None]
    assert not missing, f"args of the shard lack {missing}"
    return DEFAULTS | {name: value for name, value in said.items() if name in (*DEFAULTS, *REQUIRED, "vocab_size")}
