"""Models and data that the tests of training share. Each is made once; read them, never write into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ferry.verbs.train.config import TrainConfig
from training import WHOLE_VOCABULARY, conversations, settings, texts, tiny

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "vocab_size": 1027}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1], "head_dim": 8,
        "norm_topk_prob": True,
    }),
    "wide": ("Llama", {"vocab_size": WHOLE_VOCABULARY}),
    "small": ("Llama", {"hidden_size": 16, "intermediate_size": 32, "vocab_size": WHOLE_VOCABULARY}),
    "small-tied": ("Qwen2", {
        "hidden_size": 16, "intermediate_size": 32, "vocab_size": WHOLE_VOCABULARY, "tie_word_embeddings": True,
    }),
}  # fmt: skip
"""The odd vocabulary of `qwen2` needs padding under tp; its tokenizer has all of it. `wide` and `small` have the whole
vocabulary: their steps and saves take long enough to be hit by a kill, and a checkpoint is larger than a limit."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="session")
def model(place: Path, smollm2: Path) -> Callable[[str], Path]:
    """Tiny models by name."""

    def get(name: str) -> Path:
        kind, fields = KINDS[name]
        directory = place / name
        return directory if directory.exists() else tiny(kind, smollm2, directory, **fields)

    return get


@pytest.fixture(scope="session")
def chats(place: Path) -> Path:
    return conversations(place / "chats.jsonl", 40)


@pytest.fixture(scope="session")
def documents(place: Path) -> Path:
    return texts(place / "documents.jsonl", 60)


@pytest.fixture(scope="session")
def small_run(place: Path, chats: Path) -> Callable[..., dict[str, Any]]:
    """Return the options of a small run on the conversations, with one cache of tokens for all."""

    def get(model: Path, output: Path, **fields: Any) -> dict[str, Any]:
        rows = {"cache": str(place / "tokens"), **fields.pop("rows", {})}
        given = {"data": (str(chats),), "steps": 20, "save_every": 20, **fields}
        return {"model": model, "output": output, "rows": rows, **given}

    return get


@pytest.fixture(scope="session")
def configured(small_run: Callable[..., dict[str, Any]]) -> Callable[..., TrainConfig]:
    """The same as a config."""
    return lambda model, output, **fields: settings(**small_run(model, output, **fields))
