"""Mixtral: Mistral with experts; w1 is the gate, w3 the up and w2 the down projection, as on the hub."""

from ferry.core import family as f
from ferry.families.llama import SMOOTHING, WEIGHTS

ATTENTION = {role: name for role, name in WEIGHTS.items() if role not in f.DENSE_ROLES}
EXPERT_SMOOTHING = (
    # The router reads what the experts read: it stays in floating point, and is compensated.
    f.Smoothing("experts", f.MLP_NORM, (f.ROUTER, f.EXPERT_GATE, f.EXPERT_UP)),
    f.Smoothing("expert_down", f.EXPERT_UP, (f.EXPERT_DOWN,)),
)

FAMILY = f.Family(
    name="mixtral",
    models=("mixtral",),
    model_types=("mixtral",),
    weights=ATTENTION
    | {
        f.ROUTER: "model.layers.{layer}.block_sparse_moe.gate.weight",
        f.EXPERT_GATE: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        f.EXPERT_UP: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        f.EXPERT_DOWN: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    },
    smoothing=SMOOTHING + EXPERT_SMOOTHING,
    sizes={"expert_ffn_hidden_size": ("intermediate_size",)},
    megatron={"moe_router_pre_softmax": False},
    modules={
        f.ROUTER: "model.layers.{layer}.mlp.gate.weight",
        f.EXPERT_UP: "model.layers.{layer}.mlp.experts.gate_up_proj",
        f.EXPERT_DOWN: "model.layers.{layer}.mlp.experts.down_proj",
    },
)
