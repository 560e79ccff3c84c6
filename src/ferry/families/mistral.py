"""Mistral: Llama's names, an optional sliding window. Source: transformers `MistralForCausalLM`."""

from ferry.core import family as f
from ferry.families.llama import SMOOTHING, WEIGHTS

FAMILY = f.Family(
    name="mistral",
    models=("mistral",),
    model_types=("mistral",),
    smoothing=SMOOTHING,
    weights=WEIGHTS,
    megatron={"window_size": lambda config: [config["sliding_window"], 0] if config.get("sliding_window") else None},
)
