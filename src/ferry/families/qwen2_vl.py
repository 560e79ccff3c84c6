"""Qwen2-VL: Qwen2's decoder beside a vision tower. Source: transformers `Qwen2VLForConditionalGeneration`.

Files keep Qwen2's names for the decoder and `visual.` for the tower, which has no place in Megatron. transformers 5
writes the decoder's sizes into `text_config`; the checkpoints of the hub have them at the top of config.json.
"""

from typing import Any

from ferry.core import family as f
from ferry.families.llama import QKV_BIAS, SMOOTHING, WEIGHTS

TEXT = "text_config"


def _text(config: f.Config) -> f.Config:
    return config.get(TEXT) or config


def _rope(config: f.Config) -> dict[str, Any]:
    text = _text(config)
    found = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    return {"rope_theta": text.get("rope_theta"), **found}


def _tied(values: dict[str, Any], config: f.Config) -> dict[str, Any]:
    """The outer word counts unless only the inner one says yes, as in files of transformers 4."""
    return values | {"tied": bool(config.get("tie_word_embeddings") or _text(config).get("tie_word_embeddings"))}


FAMILY = f.Family(
    name="qwen2_vl",
    models=("qwen2-vl", "qwen2vl"),
    model_types=("qwen2_vl",),
    smoothing=SMOOTHING,
    weights=WEIGHTS | QKV_BIAS,
    sizes={key: (*(f"{TEXT}.{name}" for name in names), *names) for key, names in f.SIZES.items()},
    settle=_tied,
    carried=("visual.*",),
    megatron={
        "add_qkv_bias": True,
        "position_embedding_type": "mrope",
        "mrope_section": lambda config: _rope(config).get("mrope_section"),
        "rotary_base": lambda config: int(_rope(config)["rope_theta"] or 1_000_000),
    },
    vision=f.Vision(
        tensors="visual.",
        whole="AutoModelForImageTextToText",
        tower="model.visual",
        decoder=("model.", "model.language_model."),
        tokens={"image_token_id": 151655, "video_token_id": 151656},
    ),
)
