"""Qwen3: Llama's names with a norm on each query and key head. Source: transformers `Qwen3ForCausalLM`."""

from ferry.core import family as f
from ferry.families.llama import QK_NORM, SMOOTHING, WEIGHTS
from ferry.families.qwen2 import window

FAMILY = f.Family(
    name="qwen3",
    models=("qwen3",),
    model_types=("qwen3",),
    smoothing=SMOOTHING,
    llama_like=f.LlamaLike(window),
    weights=WEIGHTS | QK_NORM,
    megatron={"qk_layernorm": True},
)
