"""Which loss would this catch? A trainer that takes `args` back (`--use-checkpoint-args`) and builds another model."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import ferry
from models import LLAMA3_SCALING, MODELS, Shelf, read_config

TAKEN_BACK = [
    "num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "num_query_groups",
    "group_query_attention", "kv_channels", "max_position_embeddings", "position_embedding_type",
    "add_position_embedding", "use_rotary_position_embeddings", "rotary_base", "rotary_percent",
    "rotary_interleaved", "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu",
    "untie_embeddings_and_output_weights", "apply_layernorm_1p", "normalization", "apply_query_key_layer_scaling",
    "attention_dropout", "hidden_dropout", "num_experts", "moe_layer_freq", "mtp_num_layers", "tokenizer_type",
    "tokenizer_model", "tiktoken_pattern", "padded_vocab_size", "ckpt_format", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "expert_model_parallel_size",
    "params_dtype", "norm_epsilon", "vocab_size", "make_vocab_size_divisible_by",
]  # fmt: skip
"""What Megatron-LM reads in `load_args_from_checkpoint`, and what other tools need beside it."""
TAKEN_BACK_WITH_EXPERTS = [
    "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_grouped_gemm",
    "moe_shared_expert_intermediate_size", "moe_router_score_function", "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
]  # fmt: skip

COMMON = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "swiglu": True, "squared_relu": False,
    "normalization": "RMSNorm", "add_bias_linear": False, "apply_layernorm_1p": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "add_position_embedding": False, "ckpt_format": "torch", "mtp_num_layers": None,
    "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1, "make_vocab_size_divisible_by": 128, "padded_vocab_size": 256,
    "params_dtype": torch.bfloat16, "bf16": True, "tokenizer_model": None, "context_parallel_size": 1,
}  # fmt: skip
ROPE = {"position_embedding_type": "rope", "use_rotary_position_embeddings": True}
LLAMA = {
    **ROPE, "num_attention_heads": 8, "num_query_groups": 4, "group_query_attention": True, "kv_channels": 4,
    "vocab_size": 131, "max_position_embeddings": 128, "seq_length": 128, "rotary_base": 10000, "rotary_percent": 1.0,
    "rotary_interleaved": False, "add_qkv_bias": False, "qk_layernorm": False, "num_experts": None,
    "untie_embeddings_and_output_weights": True, "norm_epsilon": 1e-6, "use_rope_scaling": False, "moe_layer_freq": 1,
}  # fmt: skip
TIED = {"untie_embeddings_and_output_weights": False}
FOUR_HEADS = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}
ALL_HEADS = {"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8, "group_query_attention": False}
GLM = {**FOUR_HEADS, "rotary_percent": 0.5, "rotary_interleaved": True, "add_qkv_bias": True}
MOE = {
    "num_experts": 4, "moe_router_topk": 2, "moe_router_score_function": "softmax", "moe_grouped_gemm": False,
    "moe_router_enable_expert_bias": False, "moe_shared_expert_intermediate_size": None,
}  # fmt: skip
BAICHUAN = {**LLAMA, **ALL_HEADS, "vocab_size": 137, "max_position_embeddings": 4096, "seq_length": 4096}
EXPECTED: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": LLAMA | TIED,
    "llama-wide-heads": LLAMA | {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16},
    "llama-llama3-rope": LLAMA | {"rotary_base": 500000, "use_rope_scaling": True, "rope_scaling_factor": 8.0},
    "llama-old-llama3-rope": LLAMA | TIED | {"rotary_base": 500000, "use_rope_scaling": True,
                                            "rope_scaling_factor": 32.0},
    "llama-old-config": LLAMA | {"rotary_base": 500000, "params_dtype": torch.float16, "bf16": False, "fp16": True},
    "llama-sharded": LLAMA | {"params_dtype": torch.float32, "bf16": False, "fp16": False},
    "mistral": LLAMA | {"num_query_groups": 2, "window_size": [64, 0]},
    "qwen": LLAMA | ALL_HEADS | {"vocab_size": 133, "add_qkv_bias": True, "seq_length": 8192,
                                 "max_position_embeddings": 8192},
    "qwen2": LLAMA | {"add_qkv_bias": True},
    "qwen2-tied": LLAMA | TIED | {"add_qkv_bias": True, "num_query_groups": 2},
    "qwen3": LLAMA | FOUR_HEADS | {"kv_channels": 16, "qk_layernorm": True},
    "qwen3-moe": LLAMA | FOUR_HEADS | MOE | {
        "qk_layernorm": True, "moe_ffn_hidden_size": 24, "moe_layer_freq": [1, 0, 1, 1],
        "moe_router_pre_softmax": False,
    },
    "qwen3-moe-sparse-step": LLAMA | FOUR_HEADS | MOE | {
        "qk_layernorm": True, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1, 0, 1], "moe_router_pre_softmax": True,
    },
    "mixtral": LLAMA | MOE | {
        "moe_ffn_hidden_size": 48, "moe_layer_freq": 1, "moe_router_pre_softmax": False, "norm_epsilon": 1e-5,
        "rotary_base": 1000000,
    },
    "glm": LLAMA | GLM | {"norm_epsilon": 1.5625e-07},
    "glm-no-bias": LLAMA | {"rotary_percent": 0.5, "rotary_interleaved": True, "norm_epsilon": 1.5625e-07,
                            "kv_channels": 8},
    "chatglm3": LLAMA | GLM | {"vocab_size": 135, "norm_epsilon": 1e-5, "seq_length": 8192,
                               "max_position_embeddings": 8192},
    "glm4-chatglm": LLAMA | GLM | {"vocab_size": 135, "norm_epsilon": 1.5625e-07, "rotary_base": 5000000,
                                   "seq_length": 8192, "max_position_embeddings": 8192},
    "baichuan2-7b": BAICHUAN | {"norm_head": True},
    "baichuan2-13b": BAICHUAN | {"norm_head": True, "position_embedding_type": "alibi",
                                 "use_rotary_position_embeddings": False},
}  # fmt: skip


def args_of(directory: Path) -> dict[str, Any]:
    """Return the args of the first rank, after checking that every rank says the same."""
    found = [torch.load(path, weights_only=False, mmap=True) for path in directory.rglob("model_optim_rng.pt")]
    assert all(vars(shard["args"]) == vars(found[0]["args"]) for shard in found)
    assert all(shard["checkpoint_version"] == 3.0 for shard in found)
    return vars(found[0]["args"])


@pytest.mark.parametrize("name", EXPECTED)
def test_args_describe_the_model_that_was_converted(models: Shelf, tmp_path: Path, name: str) -> None:
    ferry.convert(source=models(name), target=tmp_path / "mg", tp=2, pp=2)
    args = args_of(tmp_path / "mg")
    expected = COMMON | EXPECTED[name]
    assert {key: args.get(key, "absent") for key in expected} == expected
    wanted = TAKEN_BACK + (TAKEN_BACK_WITH_EXPERTS if args["num_experts"] else [])
    assert [field for field in wanted if field not in args] == []


def test_args_follow_the_layout(models: Shelf, tmp_path: Path) -> None:
    ferry.convert(
        source=models("mixtral"), target=tmp_path / "mg", tp=1, pp=2, vpp=3, ep=2, noop_layers=(0, 5),
        experts="grouped", names="te", vocab_multiple=64, iteration="7",
    )  # fmt: skip
    args = args_of(tmp_path / "mg")
    expected = {
        "num_layers": 6, "noop_layers": "0,5", "virtual_pipeline_model_parallel_size": 3, "padded_vocab_size": 192,
        "num_layers_per_virtual_pipeline_stage": 1, "expert_model_parallel_size": 2, "moe_grouped_gemm": True,
        "transformer_impl": "transformer_engine", "make_vocab_size_divisible_by": 64,
    }  # fmt: skip
    assert {key: args.get(key, "absent") for key in expected} == expected


def test_layers_without_tensors_count_in_the_list_of_expert_layers(models: Shelf, tmp_path: Path) -> None:
    ferry.convert(source=models("qwen3-moe"), target=tmp_path / "mg", pp=3, noop_layers=(0, 3))
    args = args_of(tmp_path / "mg")
    assert args["num_layers"] == 6
    assert args["moe_layer_freq"] == [0, 1, 0, 0, 1, 1]


def test_uneven_stages_are_in_args(models: Shelf, tmp_path: Path) -> None:
    ferry.convert(source=models("llama"), target=tmp_path / "mg", pp=2, layer_list=(1, 3))
    assert args_of(tmp_path / "mg")["num_layer_list"] == "1,3"


def test_scaling_that_megatron_cannot_express_is_kept_and_said(models: Shelf, tmp_path: Path) -> None:
    from models import change_config

    source = models.copy("llama", tmp_path / "yarn")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    change_config(source, rope_parameters=yarn)
    made = ferry.convert(source=source, target=tmp_path / "mg")
    assert any("rope scaling yarn" in choice for choice in made["choices"])
    args = args_of(tmp_path / "mg")
    assert args["rope_scaling"]["factor"] == 4.0
    assert args["rotary_base"] == 1000000
    assert args["use_rope_scaling"] is False


def test_llama3_scaling_with_megatron_s_own_constants_needs_no_remark(models: Shelf, tmp_path: Path) -> None:
    made = ferry.convert(source=models("llama-llama3-rope"), target=tmp_path / "mg")
    assert not any("rope scaling" in choice for choice in made["choices"])
    assert args_of(tmp_path / "mg")["rope_scaling"] == {
        key: value for key, value in LLAMA3_SCALING.items() if key != "rope_theta"
    }


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_this_machine_is_written(models: Shelf, tmp_path: Path, name: str) -> None:
    """Paths, user and host of the converting machine stay out of shards and manifests."""
    source = models.copy(name, tmp_path / "the-model")
    assets = b"".join(path.read_bytes() for path in source.rglob("*") if path.is_file() and path.stat().st_size < 4096)
    ferry.convert(source=source, target=tmp_path / "mg", tp=2, hf_assets=source)
    ferry.convert(source=tmp_path / "mg", target=tmp_path / "hf")
    told = [str(tmp_path), str(Path.home()), os.getcwd(), str(Path(__file__).parent), platform.node()]
    secrets = [word.encode() for word in told if len(word) > 2 and word.encode() not in assets]
    for path in [*(tmp_path / "mg").rglob("*"), *(tmp_path / "hf").rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            assert [secret for secret in secrets if secret in data] == [], path


def test_the_config_of_every_model_names_its_own_vocabulary(models: Shelf) -> None:
    """A guard for this table: the expectations above are about these very configs."""
    for name, expected in EXPECTED.items():
        config = read_config(models(name))
        assert config.get("padded_vocab_size", config.get("vocab_size")) == expected["vocab_size"]
