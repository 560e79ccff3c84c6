"""ChatGLM3 and GLM-4 in their remote-code form: packed query_key_value and packed gate;up. Source: their remote code.

Half of each head is rotated, in interleaved pairs; `rope_ratio` stretches the rotary base of 10,000.
"""

from ferry.core import family as f
from ferry.families.llama import SMOOTHING

FAMILY = f.Family(
    name="chatglm",
    models=("chatglm", "chatglm3", "chatglmv3", "glm4", "glmv4"),
    model_types=("chatglm",),
    smoothing=SMOOTHING,
    weights={
        f.EMBEDDING: "transformer.embedding.word_embeddings.weight",
        f.ATTENTION_NORM: "transformer.encoder.layers.{layer}.input_layernorm.weight",
        **f.packed("transformer.encoder.layers.{layer}.self_attention.query_key_value.weight", f.QUERY, f.KEY, f.VALUE),
        f.ATTENTION_OUT: "transformer.encoder.layers.{layer}.self_attention.dense.weight",
        f.MLP_NORM: "transformer.encoder.layers.{layer}.post_attention_layernorm.weight",
        **f.packed("transformer.encoder.layers.{layer}.mlp.dense_h_to_4h.weight", f.GATE, f.UP),
        f.DOWN: "transformer.encoder.layers.{layer}.mlp.dense_4h_to_h.weight",
        f.FINAL_NORM: "transformer.encoder.final_layernorm.weight",
        f.HEAD: "transformer.output_layer.weight",
    },
    optional={
        "add_qkv_bias": f.packed(
            "transformer.encoder.layers.{layer}.self_attention.query_key_value.bias",
            f.QUERY_BIAS,
            f.KEY_BIAS,
            f.VALUE_BIAS,
        )
    },
    sizes={
        "num_layers": ("num_layers",),
        "ffn_hidden_size": ("ffn_hidden_size",),
        "num_groups": ("multi_query_group_num",),
        "head_dim": ("kv_channels",),
        "vocab_size": ("padded_vocab_size", "vocab_size"),
        "norm_epsilon": ("layernorm_epsilon",),
        "max_positions": ("seq_length",),
    },
    settle=lambda values, config: (
        values if config.get("multi_query_attention") else values | {"num_groups": values["num_heads"]}
    ),
    carried=("transformer.rotary_pos_emb.inv_freq",),
    megatron={
        "add_qkv_bias": lambda config: bool(config.get("add_qkv_bias")),
        "rotary_percent": 0.5,
        "rotary_interleaved": True,
        "rotary_base": lambda config: 10000.0 * config.get("rope_ratio", 1),
    },
)
