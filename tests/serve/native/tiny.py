"""Small random models as files, and what transformers itself answers with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 211, "eos_token_id": None,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 211, "eos_token_id": None},
}  # fmt: skip


def write_model(kind: str, directory: Path) -> Path:
    """Write a random model of a kind of transformers, in float32."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Sharp enough that rounding never decides between two tokens.
            parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained(directory)
    return directory


def peers_answer(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Return what transformers says, greedily."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return [int(token) for token in found[0, len(prompt) :]]


def likeliest_after(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """Return the likeliest token at each place of an answer: where that is the answer, `generate` says the same."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return [int(token) for token in logits.argmax(dim=-1)]
