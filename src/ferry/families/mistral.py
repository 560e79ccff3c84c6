"""Mistral: Llama's names, an optional sliding window. Source: transformers `MistralForCausalLM`."""

from ferry.core import family as f
from ferry.families.llama import SMOOTHING, WEIGHTS

DEFAULT_WINDOW = 4096
"""What transformers assumes where config.json does not say."""


def window(config: f.Config, layer: int) -> int:
    return int(config.get("sliding_window", DEFAULT_WINDOW) or 0)


FAMILY = f.Family(
    name="mistral",
    models=("mistral",),
    model_types=("mistral",),
    smoothing=SMOOTHING,
    weights=WEIGHTS,
    llama_like=f.LlamaLike(window),
    megatron={"window_size": lambda config: [config["sliding_window"], 0] if config.get("sliding_window") else None},
)
