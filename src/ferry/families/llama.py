"""Llama and models that kept its names: Llama 2, 3, 3.1, 3.2, Yi, SmolLM2. Source: transformers `LlamaForCausalLM`."""

from ferry.core import family as f

WEIGHTS = {
    f.EMBEDDING: "model.embed_tokens.weight",
    f.ATTENTION_NORM: "model.layers.{layer}.input_layernorm.weight",
    f.QUERY: "model.layers.{layer}.self_attn.q_proj.weight",
    f.KEY: "model.layers.{layer}.self_attn.k_proj.weight",
    f.VALUE: "model.layers.{layer}.self_attn.v_proj.weight",
    f.ATTENTION_OUT: "model.layers.{layer}.self_attn.o_proj.weight",
    f.MLP_NORM: "model.layers.{layer}.post_attention_layernorm.weight",
    f.GATE: "model.layers.{layer}.mlp.gate_proj.weight",
    f.UP: "model.layers.{layer}.mlp.up_proj.weight",
    f.DOWN: "model.layers.{layer}.mlp.down_proj.weight",
    f.FINAL_NORM: "model.norm.weight",
    f.HEAD: "lm_head.weight",
}
QKV_BIAS = {
    f.QUERY_BIAS: "model.layers.{layer}.self_attn.q_proj.bias",
    f.KEY_BIAS: "model.layers.{layer}.self_attn.k_proj.bias",
    f.VALUE_BIAS: "model.layers.{layer}.self_attn.v_proj.bias",
}
QK_NORM = {
    f.QUERY_NORM: "model.layers.{layer}.self_attn.q_norm.weight",
    f.KEY_NORM: "model.layers.{layer}.self_attn.k_norm.weight",
}
SMOOTHING = (
    f.Smoothing("qkv", f.ATTENTION_NORM, (f.QUERY, f.KEY, f.VALUE)),
    # Attention mixes values over tokens, never over channels.
    f.Smoothing("out", f.VALUE, (f.ATTENTION_OUT,), heads=True),
    f.Smoothing("gate_up", f.MLP_NORM, (f.GATE, f.UP)),
    # down(act(gate) * up): a channel of up is a factor of the same channel of down's input.
    f.Smoothing("down", f.UP, (f.DOWN,)),
)
"""Of every decoder here with plain norms before its linears and a gated MLP."""

FAMILY = f.Family(
    name="llama",
    models=("llama", "llama2", "llama3", "llama3.1", "llama3.2", "yi", "smollm2"),
    model_types=("llama",),
    weights=WEIGHTS,
    smoothing=SMOOTHING,
    llama_like=f.LlamaLike(),
    # Old conversions stored the rotary frequencies, which follow from the config.
    carried=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
