"""Qwen3 mixture of experts, with plain layers where the config says so. Source: transformers `Qwen3MoeForCausalLM`."""

from typing import Any

from ferry.core import family as f
from ferry.families.llama import QK_NORM, SMOOTHING, WEIGHTS
from ferry.families.mixtral import EXPERT_SMOOTHING


def _dense_layers(values: dict[str, Any], config: f.Config) -> dict[str, Any]:
    """Every `decoder_sparse_step`-th layer has experts, but those in `mlp_only_layers`."""
    step = config.get("decoder_sparse_step") or 1
    plain = set(config.get("mlp_only_layers") or ())
    layers = range(values["num_layers"])
    return values | {"dense_layers": tuple(i for i in layers if i in plain or (i + 1) % step)}


FAMILY = f.Family(
    name="qwen3_moe",
    models=("qwen3-moe", "qwen3_moe"),
    model_types=("qwen3_moe",),
    weights=WEIGHTS
    | QK_NORM
    | {
        f.ROUTER: "model.layers.{layer}.mlp.gate.weight",
        f.EXPERT_GATE: "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        f.EXPERT_UP: "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        f.EXPERT_DOWN: "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    },
    smoothing=SMOOTHING + EXPERT_SMOOTHING,
    sizes={"num_experts": ("num_experts", "num_local_experts")},
    settle=_dense_layers,
    # Without renormalisation the softmax runs over all experts, before the choice.
    megatron={"qk_layernorm": True, "moe_router_pre_softmax": lambda config: not config.get("norm_topk_prob", False)},
    modules={
        f.ROUTER: "model.layers.{layer}.mlp.gate.weight",
        f.EXPERT_UP: "model.layers.{layer}.mlp.experts.gate_up_proj",
        f.EXPERT_DOWN: "model.layers.{layer}.mlp.experts.down_proj",
    },
)
