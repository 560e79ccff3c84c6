"""GLM-4 as transformers carries it: packed gate_up, biases on request, half-rotated heads. Source: `GlmForCausalLM`."""

from ferry.core import family as f
from ferry.families.llama import QKV_BIAS, SMOOTHING, WEIGHTS

OTHERS: dict[str, str | f.Packed] = {role: name for role, name in WEIGHTS.items() if role not in (f.GATE, f.UP)}

FAMILY = f.Family(
    name="glm",
    models=("glm",),
    model_types=("glm",),
    smoothing=SMOOTHING,
    weights=OTHERS | f.packed("model.layers.{layer}.mlp.gate_up_proj.weight", f.GATE, f.UP),
    optional={"attention_bias": QKV_BIAS},
    megatron={
        "add_qkv_bias": lambda config: bool(config.get("attention_bias")),
        "rotary_interleaved": True,
    },
)
