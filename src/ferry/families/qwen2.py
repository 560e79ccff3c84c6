"""Qwen1.5, Qwen2 and Qwen2.5: Llama's names, query, key and value biases. Source: transformers `Qwen2ForCausalLM`."""

from ferry.core import family as f
from ferry.families.llama import QKV_BIAS, SMOOTHING, WEIGHTS

WINDOW, FULL_LAYERS = 4096, 28
"""What transformers assumes where config.json does not say."""


def window(config: f.Config, layer: int) -> int:
    """Return the window of a layer: where windows are used at all, of those after the first `max_window_layers`."""
    kinds = config.get("layer_types")
    is_sliding = kinds[layer] == "sliding_attention" if kinds else layer >= config.get("max_window_layers", FULL_LAYERS)
    return int(config.get("sliding_window", WINDOW) or 0) if config.get("use_sliding_window") and is_sliding else 0


FAMILY = f.Family(
    name="qwen2",
    models=("qwen1.5", "qwen15", "qwen2", "qwen2.5", "qwen25"),
    model_types=("qwen2",),
    smoothing=SMOOTHING,
    llama_like=f.LlamaLike(window),
    weights=WEIGHTS | QKV_BIAS,
    megatron={"add_qkv_bias": True},
)
