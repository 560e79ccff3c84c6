"""Qwen (the first): packed c_attn with a bias, w2 is the gate and w1 the up projection. Source: its remote code.

Its `intermediate_size` counts gate and up together, so the real width is half. Heads are never grouped.
"""

from typing import Any

from ferry.core import family as f
from ferry.families.llama import SMOOTHING


def _halve(values: dict[str, Any], config: f.Config) -> dict[str, Any]:
    return values | {"ffn_hidden_size": config["intermediate_size"] // 2, "num_groups": config["num_attention_heads"]}


FAMILY = f.Family(
    name="qwen",
    models=("qwen",),
    model_types=("qwen",),
    smoothing=SMOOTHING,
    weights={
        f.EMBEDDING: "transformer.wte.weight",
        f.ATTENTION_NORM: "transformer.h.{layer}.ln_1.weight",
        **f.packed("transformer.h.{layer}.attn.c_attn.weight", f.QUERY, f.KEY, f.VALUE),
        **f.packed("transformer.h.{layer}.attn.c_attn.bias", f.QUERY_BIAS, f.KEY_BIAS, f.VALUE_BIAS),
        f.ATTENTION_OUT: "transformer.h.{layer}.attn.c_proj.weight",
        f.MLP_NORM: "transformer.h.{layer}.ln_2.weight",
        f.GATE: "transformer.h.{layer}.mlp.w2.weight",
        f.UP: "transformer.h.{layer}.mlp.w1.weight",
        f.DOWN: "transformer.h.{layer}.mlp.c_proj.weight",
        f.FINAL_NORM: "transformer.ln_f.weight",
        f.HEAD: "lm_head.weight",
    },
    sizes={
        "head_dim": ("kv_channels",),
        "norm_epsilon": ("layer_norm_epsilon",),
        "max_positions": ("seq_length", "max_position_embeddings"),
        "rotary_base": ("rotary_emb_base",),
    },
    settle=_halve,
    carried=("transformer.rotary_emb.inv_freq",),
    megatron={"add_qkv_bias": True},
)
