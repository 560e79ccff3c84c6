"""Models of any size that take no disk: a config.json and weight files of which only the header is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ferry.core.safetensors import make_header

SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
SEVEN_B = {
    **SMALL, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
SEVEN_B_WEIGHTS = 6_738_415_616


def model_in(directory: Path, *, values: int = 100_000, dtype: str = "BF16", **config: Any) -> Path:
    """Write a model of so many float values; `config` replaces fields of `SMALL`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SMALL, **config}))
    header = make_header([("model.embed_tokens.weight", dtype, (values, 1))], {})
    with open(directory / "model.safetensors", "wb") as file:
        file.write(header.raw)
        file.truncate(header.file_bytes)
    return directory


def seven_b(directory: Path, **config: Any) -> Path:
    """Write a model of the size of Llama 2 7B."""
    return model_in(directory, values=SEVEN_B_WEIGHTS, **{**SEVEN_B, **config})
