"""The `args` that Megatron stores in every shard and takes back with `--use-checkpoint-args`.

Everything a trainer needs to build the model is derived from config.json. No path of this machine is written, so the
tokenizer's is left to the trainer's own flag. Source of the field list: Megatron-LM `arguments.py` and
`checkpointing.py`.
"""

from __future__ import annotations

from typing import Any

from ferry.core.family import Config, Model
from ferry.formats.megatron_names import MegatronLayout
from ferry.formats.pickles import DTYPE_TORCH, Global, Instance

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values built into Megatron's `--use-rope-scaling`."""


def build_args(model: Model, layout: MegatronLayout, dtype: str, divisible_by: int) -> Instance:
    """Return the `argparse.Namespace` for a checkpoint, ready to be pickled."""
    fields = _sizes(model) | _positions(model.config, model) | _parallel(model, layout, dtype, divisible_by)
    if model.dims.num_experts:
        fields |= _experts(model, layout)
    for key, value in model.family.megatron.items():
        value = value(model.config) if callable(value) else value
        if value is not None:
            fields[key] = value
    return Instance(Global("argparse", "Namespace"), fields)


def _sizes(model: Model) -> dict[str, Any]:
    d, config, family = model.dims, model.config, model.family
    return {
        "num_layers": d.num_layers,
        "hidden_size": d.hidden_size,
        "ffn_hidden_size": d.ffn_hidden_size,
        "num_attention_heads": d.num_heads,
        "group_query_attention": d.num_groups != d.num_heads,
        "num_query_groups": d.num_groups,
        "kv_channels": d.head_dim,
        "vocab_size": d.vocab_size,
        "untie_embeddings_and_output_weights": not d.tied,
        "normalization": "RMSNorm",
        "norm_epsilon": float(family.read("norm_epsilon", config, 1e-6)),
        "layernorm_epsilon": float(family.read("norm_epsilon", config, 1e-6)),
        "apply_layernorm_1p": False,
        "qk_layernorm": False,
        "swiglu": True,
        "squared_relu": False,
        "openai_gelu": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "apply_query_key_layer_scaling": False,
        "attention_softmax_in_fp32": False,
        "masked_softmax_fusion": True,
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "hidden_dropout": float(config.get("hidden_dropout") or 0.0),
        "init_method_std": float(config.get("initializer_range") or 0.02),
        "num_experts": None,
        "moe_layer_freq": 1,
        "mtp_num_layers": None,
    }


def _positions(config: Config, model: Model) -> dict[str, Any]:
    rope = rope_parameters(config)
    longest = int(model.family.read("max_positions", config, 4096))
    base = rope.get("rope_theta") or model.family.read("rotary_base", config, 10000.0)
    fields: dict[str, Any] = {
        "seq_length": longest,
        "max_position_embeddings": longest,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(base) if float(base).is_integer() else float(base),
        "rotary_percent": float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0),
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        fields |= {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    elif kind == "linear":
        factor = float(rope["factor"])
        fields["rotary_seq_len_interpolation_factor"] = int(factor) if factor.is_integer() else factor
    if kind != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return fields


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return the rotary settings, from where transformers 5 (`rope_parameters`) or older ones keep them."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def scaling_note(config: Config) -> str:
    """Return a warning where Megatron has no setting for this model's rope scaling; "" where it has."""
    rope = rope_parameters(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "linear"):
        return ""
    differs = [key for key, value in LLAMA3_SCALING.items() if float(rope.get(key, value)) != value]
    if kind == "llama3" and not differs:
        return ""
    what = f"llama3 with other {', '.join(differs)}" if kind == "llama3" else kind
    return f"rope scaling {what}: Megatron has no such setting; args.rope_scaling keeps it, the trainer must apply it"


def _parallel(model: Model, layout: MegatronLayout, dtype: str, divisible_by: int) -> dict[str, Any]:
    total = model.dims.num_layers + len(layout.noop_layers)
    virtual = total // layout.pp // layout.vpp if layout.vpp > 1 else None
    return {
        "num_layers": total,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": virtual,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "num_layer_list": ",".join(map(str, layout.layer_list)) or None,
        "noop_layers": ",".join(map(str, layout.noop_layers)) or None,
        "padded_vocab_size": layout.padded_vocab,
        "make_vocab_size_divisible_by": divisible_by,
        "params_dtype": Global("torch", DTYPE_TORCH[dtype]),
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "transformer_impl": "transformer_engine" if layout.names == "te" else "local",
        "use_mcore_models": layout.names != "classic",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,
        "tiktoken_pattern": None,
        "ckpt_format": "torch",
        "dist_ckpt_format": "torch_dist",
        "use_distributed_optimizer": False,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _experts(model: Model, layout: MegatronLayout) -> dict[str, Any]:
    d = model.dims
    plain = [layer for layer in range(d.num_layers) if not d.is_moe(layer)]
    return {
        "num_experts": d.num_experts,
        "moe_ffn_hidden_size": d.expert_ffn_hidden_size,
        "moe_router_topk": d.experts_per_token,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_topk_scaling_factor": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_grouped_gemm": layout.experts != "sequential",
        "moe_layer_freq": _expert_layers(model, layout) if plain else 1,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": float(model.config.get("router_aux_loss_coef") or 0.0),
    }


def _expert_layers(model: Model, layout: MegatronLayout) -> list[int]:
    """Return 1 for each layer with experts, else 0, as Megatron counts layers: noop layers too."""
    layers = iter(range(model.dims.num_layers))
    total = model.dims.num_layers + len(layout.noop_layers)
    return [int(position not in layout.noop_layers and model.dims.is_moe(next(layers))) for position in range(total)]
