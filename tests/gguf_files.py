"""Writes GGUF files the way llama.cpp's converter does, from models that transformers made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_model(
    path: Path, model: Any, arch: str, *, kind: Type = Type.BF16, tokens: dict[str, Any] | None = None
) -> None:
    """Write a transformers model. Matrices become `kind`; vectors stay float32, as llama.cpp does it."""
    config = model.config
    writer = new_file(path, arch, config)
    write_tokenizer(writer, tokens or tiny_tokens(config.vocab_size))
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            values = permuted(values, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            values = permuted(values, config.num_key_value_heads)
        if values.ndim == 1 or kind == Type.F32:
            writer.add_tensor(gguf_name(name), values.astype(np.float32))
        elif kind == Type.F16:
            writer.add_tensor(gguf_name(name), values.astype(np.float16))
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    finish(writer)


def new_file(path: Path, arch: str, config: Any) -> gguf.GGUFWriter:
    """Open a file and write the metadata of a model."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    return writer


def write_tokenizer(writer: gguf.GGUFWriter, tokens: dict[str, Any]) -> None:
    writer.add_tokenizer_model(tokens.get("model", "gpt2"))
    writer.add_tokenizer_pre(tokens.get("pre", "gpt-2"))
    writer.add_token_list(tokens["tokens"])
    writer.add_token_types(tokens["types"])
    writer.add_token_merges(tokens["merges"])
    for key, value in tokens.get("ids", {}).items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    if "add_bos" in tokens:
        writer.add_add_bos_token(tokens["add_bos"])


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{HF_TO_GGUF[part]}.{kind}"
    return f"{HF_TO_GGUF[stem]}.{kind}"


def permuted(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute, word for word."""
    return (
        values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def tiny_tokens(vocab_size: int) -> dict[str, Any]:
    """The 256 bytes and one merge as tokens, and placeholders for the rest of the rows."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "he"]
    unused = [f"[PAD{index}]" for index in range(len(tokens), vocab_size)]
    return {"tokens": tokens + unused, "types": [1] * len(tokens) + [5] * len(unused), "merges": ["h e"]}


def tiny_model(arch: str, **changes: Any) -> Any:
    """A small random model of an architecture, in bfloat16, every weight different from its initial value."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        # Parameters alone: the rotary frequencies are a buffer that stays in float32.
        parameter.data = parameter.data.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.05).to(torch.bfloat16)
    return model.eval()
