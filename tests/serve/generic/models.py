"""Tiny random models of many architectures, and steps over them as the scheduler would make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ferry.engines.native.executor import Batch

VOCAB = 101
BLOCK = 8
LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LIKE_GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SINKS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12, "head_dim": 8}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LIKE_LLAMA}),
    "qwen2": ("Qwen2", {**LIKE_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**LIKE_LLAMA, "head_dim": 16}),
    "mistral-window": ("Mistral", {**LIKE_LLAMA, "sliding_window": 12}),
    "gemma2-softcap-window": ("Gemma2", {**LIKE_LLAMA, "head_dim": 8, "sliding_window": 12,
                                         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3-window": ("Gemma3Text", {**LIKE_LLAMA, "head_dim": 8, "sliding_window": 12, "num_hidden_layers": 3,
                                 "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "mixtral": ("Mixtral", {**LIKE_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {**LIKE_LLAMA, **EXPERTS, "head_dim": 8}),
    "gpt-oss-sinks": ("GptOss", {**LIKE_LLAMA, **SINKS}),
    "deepseek-v3-latent": ("DeepseekV3", {**LIKE_LLAMA, **LATENT}),
    "gpt2": ("GPT2", {**LIKE_GPT}),
    "gpt-neox": ("GPTNeoX", {**LIKE_LLAMA}),
    "opt": ("OPT", {**LIKE_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("Phi3", {**LIKE_LLAMA, "sliding_window": 12}),
    "glm": ("Glm", {**LIKE_LLAMA, "head_dim": 8}),
}  # fmt: skip


def write_model(kind: str, fields: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of transformers; `kind` is the prefix of its config class."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # What is 1 or 0 everywhere could be left out unseen.
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(directory)
    return directory


def expected_logits(directory: Path, sequences: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Return transformers' own logits of whole sequences, one at a time, without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return [model(torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids in sequences]


def steps_of(
    sequences: Sequence[np.ndarray], tables: Sequence[Sequence[int]], cuts: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[tuple[Batch, list[tuple[int, int, int]]]]:
    """Yield steps that read sequences by parts; `cuts[step][sequence]` is what a step reads of it, (0, 0) = nothing.

    All rows are wanted; beside each step stands whose they are: sequence, first place, end.
    """
    for cut in cuts:
        read = [(number, start, end) for number, (start, end) in enumerate(cut) if end > start]
        longest = max(len(tables[number]) for number, _, _ in read)
        places = [np.arange(start, end) for _, start, end in read]
        slots = [
            np.array(tables[number])[place // BLOCK] * BLOCK + place % BLOCK
            for (number, _, _), place in zip(read, places, strict=True)
        ]
        num_tokens = sum(map(len, places))
        yield (
            Batch(
                token_ids_T=np.concatenate([sequences[number][start:end] for number, start, end in read]),
                positions_T=np.concatenate(places),
                slots_T=np.concatenate(slots),
                query_starts_B1=np.cumsum([0, *map(len, places)]),
                context_lens_B=np.array([end for _, _, end in read]),
                block_tables_BM=np.array([[*tables[n], *[0] * (longest - len(tables[n]))] for n, _, _ in read]),
                logits_rows_R=np.arange(num_tokens),
            ),
            read,
        )
