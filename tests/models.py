"""Small models with random weights, one recipe per name: every family, and the oddities of real checkpoints.

Families of transformers are written by its own `save_pretrained`; families of remote code are written by the names
their code documents. Every parameter is random, norms and biases too: what is 1 or 0 everywhere cannot show a wrong
order. Vocabularies are odd, so that padding is always needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
SMALL = {
    "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_SCALING = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

ASSETS = {
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"\xc3\xa4": 0}, "merges": []}}\n',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "tokenizer.model": bytes(range(256)),
    "vocab.txt": b"[PAD]\r\n[UNK]\r\n",
    "merges.txt": b"#version: 0.2\n",
    "qwen.tiktoken": b"IQ== 0\nIg== 1\n",
    "chat_template.jinja": b"{% for message in messages %}{{ message.content }}{% endfor %}",
    "tokenization_x.py": b"raise SystemExit('a converter must not run the code it carries')\n",
    "modeling_x.py": b"raise SystemExit('a converter must not run the code it carries')\n",
    "assets/deep/notes.txt": b"a file in a nested folder\n",
    "LICENSE": b"as you like it",
    "empty": b"",
}


def make(name: str, directory: Path) -> Path:
    """Write the model called `name` into a new directory."""
    directory.mkdir(parents=True)
    MODELS[name](directory)
    for path, content in ASSETS.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    if not (directory / "generation_config.json").exists():
        (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    return directory


def read_weights(directory: Path) -> Tensors:
    """Return all tensors of a model directory."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())  # type: ignore[no-any-return]


def change_config(directory: Path, **fields: Any) -> None:
    """Set fields of config.json; None removes one."""
    config = {**read_config(directory), **fields}
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept, indent=2))


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@cache
def _quiet_transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _save(
    directory: Path, kind: str, *, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **fields: Any
) -> None:
    """Write a random model of transformers: `kind` is the prefix of its config and model classes."""
    transformers = _quiet_transformers()
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **fields}, dtype=dtype)
    torch.manual_seed(len(kind) + len(fields))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Around 0 for matrices, around 1 for norms: logits stay small enough to compare.
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(directory, max_shard_size=shard)


def _transformers(kind: str, **fields: Any) -> Callable[[Path], None]:
    return lambda directory: _save(directory, kind, **fields)


def _tied_with_stored_head(directory: Path) -> None:
    """Some tools store the tied head a second time."""
    _save(directory, "Llama", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", "made_by": "another tool"})


def _old_spelling(directory: Path) -> None:
    """config.json as transformers 4 wrote it, weights in float16."""
    _save(directory, "Llama", dtype=torch.float16)
    change_config(
        directory, rope_parameters=None, dtype=None, torch_dtype="float16", rope_theta=500000.0, rope_scaling=None,
        head_dim=None,
    )  # fmt: skip


def _old_llama3_scaling(directory: Path) -> None:
    """Llama 3.2 as it lies on the hub: `rope_scaling` beside `rope_theta`."""
    _save(directory, "Llama", tie_word_embeddings=True)
    scaling = {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_theta"} | {"factor": 32.0}
    change_config(directory, rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)


def _with_inv_freq(directory: Path) -> None:
    """Llama 1 and 2 conversions stored the rotary frequencies of each layer."""
    _save(directory, "Llama")
    tensors = load_file(directory / "model.safetensors")
    for layer in range(SMALL["num_hidden_layers"]):  # type: ignore[arg-type]
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(2)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _torch_bin(directory: Path) -> None:
    """Weights as torch wrote them before safetensors, in one file."""
    _save(directory, "Llama")
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def _torch_bin_sharded(directory: Path) -> None:
    """The same with an index, tied: the head is a second view of the embedding's storage."""
    _save(directory, "Qwen2", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = list(tensors)
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, directory / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def _write(directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], num_files: int = 1) -> None:
    torch.manual_seed(len(shapes))
    tensors = {name: _random(shape) for name, shape in shapes.items()}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    names = sorted(tensors)
    if num_files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        own = names[number::num_files]
        save_file({name: tensors[name] for name in own}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {
        "metadata": {"total_size": sum(2 * tensor.numel() for tensor in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _qwen(directory: Path) -> None:
    """Qwen 1: `modeling_qwen.py` of Qwen-7B."""
    hidden, ffn, vocab = 32, 48, 133
    config = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": hidden, "intermediate_size": 2 * ffn,
        "num_hidden_layers": 4, "num_attention_heads": 4, "kv_channels": 8, "vocab_size": vocab, "seq_length": 8192,
        "max_position_embeddings": 32768, "layer_norm_epsilon": 1e-06, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "no_bias": True, "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True,
        "tokenizer_class": "QWenTokenizer", "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(4):
        prefix = f"transformer.h.{layer}."
        shapes |= {
            prefix + "ln_1.weight": (hidden,), prefix + "attn.c_attn.weight": (3 * hidden, hidden),
            prefix + "attn.c_attn.bias": (3 * hidden,), prefix + "attn.c_proj.weight": (hidden, hidden),
            prefix + "ln_2.weight": (hidden,), prefix + "mlp.w1.weight": (ffn, hidden),
            prefix + "mlp.w2.weight": (ffn, hidden), prefix + "mlp.c_proj.weight": (hidden, ffn),
        }  # fmt: skip
    shapes |= {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    _write(directory, config, shapes, num_files=3)


def _chatglm(directory: Path, **fields: Any) -> None:
    """ChatGLM3 and GLM-4: `modeling_chatglm.py`."""
    hidden, ffn, vocab, heads, groups, head_dim = 32, 48, 135, 4, 2, 8
    config = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": hidden, "ffn_hidden_size": ffn,
        "num_layers": 4, "num_attention_heads": heads, "kv_channels": head_dim, "multi_query_attention": True,
        "multi_query_group_num": groups, "padded_vocab_size": vocab, "seq_length": 8192, "layernorm_epsilon": 1e-05,
        "rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": True, "tie_word_embeddings": False,
        "original_rope": True, "torch_dtype": "bfloat16", **fields,
    }  # fmt: skip
    packed = (heads + 2 * groups) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (vocab, hidden),
        "transformer.rotary_pos_emb.inv_freq": (2,),
    }
    for layer in range(4):
        prefix = f"transformer.encoder.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attention.query_key_value.weight": (packed, hidden),
            prefix + "self_attention.query_key_value.bias": (packed,),
            prefix + "self_attention.dense.weight": (hidden, heads * head_dim),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            prefix + "mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
    shapes |= {
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }
    _write(directory, config, shapes, num_files=2)


def _baichuan2(directory: Path, **fields: Any) -> None:
    """Baichuan 2: `modeling_baichuan.py`; the 13B model has no `max_position_embeddings`."""
    hidden, ffn, vocab = 32, 48, 137
    config = {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": vocab,
        "rms_norm_eps": 1e-06, "model_max_length": 4096, "tie_word_embeddings": False, "z_loss_weight": 0,
        "torch_dtype": "bfloat16", **fields,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,), prefix + "self_attn.W_pack.weight": (3 * hidden, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden), prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (ffn, hidden), prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }  # fmt: skip
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    _write(directory, config, shapes)


MODELS: dict[str, Callable[[Path], None]] = {
    "llama": _transformers("Llama"),
    "llama-tied": _transformers("Llama", tie_word_embeddings=True),
    "llama-tied-stored-head": _tied_with_stored_head,
    "llama-wide-heads": _transformers("Llama", head_dim=16, num_attention_heads=4, num_key_value_heads=2),
    "llama-llama3-rope": _transformers("Llama", rope_parameters=LLAMA3_SCALING),
    "llama-old-llama3-rope": _old_llama3_scaling,
    "llama-sharded": _transformers("Llama", shard="20KB", dtype=torch.float32),
    "llama-old-config": _old_spelling,
    "llama-inv-freq": _with_inv_freq,
    "mistral": _transformers("Mistral", sliding_window=64, num_key_value_heads=2),
    "qwen": _qwen,
    "qwen2": _transformers("Qwen2"),
    "qwen2-tied": _transformers("Qwen2", tie_word_embeddings=True, num_key_value_heads=2),
    "qwen3": _transformers("Qwen3", head_dim=16, num_attention_heads=4, num_key_value_heads=2),
    "qwen3-moe": _transformers(
        "Qwen3Moe", head_dim=8, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, mlp_only_layers=[1], norm_topk_prob=True,
    ),
    "qwen3-moe-sparse-step": _transformers(
        "Qwen3Moe", head_dim=8, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, decoder_sparse_step=2,
    ),
    "mixtral": _transformers("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "glm": _transformers("Glm", head_dim=8, num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
                         pad_token_id=0),
    "glm-no-bias": _transformers("Glm", head_dim=8, attention_bias=False, pad_token_id=0),
    "chatglm3": _chatglm,
    "glm4-chatglm": lambda directory: _chatglm(directory, rope_ratio=500, layernorm_epsilon=1.5625e-07),
    "baichuan2-7b": lambda directory: _baichuan2(directory, max_position_embeddings=4096),
    "baichuan2-13b": _baichuan2,
    "llama-bin": _torch_bin,
    "qwen2-bin-sharded": _torch_bin_sharded,
}  # fmt: skip
REMOTE_CODE = ("qwen", "chatglm3", "glm4-chatglm", "baichuan2-7b", "baichuan2-13b")
NORM_HEAD = ("baichuan2-7b", "baichuan2-13b")
TORCH_BIN = ("llama-bin", "qwen2-bin-sharded")
NATIVE = tuple(name for name in MODELS if name not in REMOTE_CODE)
"""Models that transformers loads without remote code."""


class Shelf:
    """Makes each model once and keeps it. Read the originals, never write into them: take a copy."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def __call__(self, name: str) -> Path:
        directory = self.top / name
        return directory if directory.exists() else make(name, directory)

    def copy(self, name: str, target: Path) -> Path:
        shutil.copytree(self(name), target)
        return target
