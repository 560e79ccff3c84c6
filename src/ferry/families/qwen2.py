"""Qwen1.5, Qwen2 and Qwen2.5: Llama's names, query, key and value biases. Source: transformers `Qwen2ForCausalLM`."""

from ferry.core import family as f
from ferry.families.llama import QKV_BIAS, SMOOTHING, WEIGHTS

FAMILY = f.Family(
    name="qwen2",
    models=("qwen1.5", "qwen15", "qwen2", "qwen2.5", "qwen25"),
    model_types=("qwen2",),
    smoothing=SMOOTHING,
    weights=WEIGHTS | QKV_BIAS,
    megatron={"add_qkv_bias": True},
)
