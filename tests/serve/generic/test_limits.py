"""How long a sequence may be, after every kind of config.json; and what a refusal says."""

from __future__ import annotations

from typing import Any

import pytest

from ferry.core.errors import ConfigError
from ferry.engines.native.limits import context_length, longest_context

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DYNAMIC = {"type": "dynamic", "factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("config", "num_tokens", "source"),
    [
        ({"max_position_embeddings": 8192}, 8192, "max_position_embeddings"),
        ({"n_positions": 1024}, 1024, "n_positions"),
        ({"seq_length": 8192}, 8192, "seq_length"),
        ({"model_max_length": 4096}, 4096, "model_max_length"),
        ({"text_config": {"max_position_embeddings": 512}}, 512, "max_position_embeddings"),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072, "max_position_embeddings"),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072, "factor 4"),
        ({"max_position_embeddings": 131072, "rope_parameters": YARN}, 131072, "max_position_embeddings"),
        ({"max_position_embeddings": 4096, "rope_scaling": DYNAMIC}, 4096, "max_position_embeddings"),
        (
            {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": LONG},
            4096,
            "original_max_position_embeddings",
        ),
        ({"max_position_embeddings": 65536, "attention_chunk_size": 8192}, 8192, "attention_chunk_size"),
    ],
)
def test_the_longest_sequence_follows_from_the_config(config: dict[str, Any], num_tokens: int, source: str) -> None:
    found = longest_context(config)
    assert found.num_tokens == num_tokens
    assert source in found.source


def test_a_longer_one_is_refused_with_the_limit_and_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        context_length({"seq_length": 8192}, 16384)
    assert caught.value.code == "serve.max-model-len"
    assert "--max-model-len 16384 is more than the model takes: 8192, from seq_length in config.json" in str(
        caught.value
    )


def test_a_shorter_one_is_taken() -> None:
    assert context_length({"seq_length": 8192}, 100).num_tokens == 100


def test_where_nothing_is_said_a_note_says_what_is_assumed() -> None:
    assert "2048 tokens are assumed" in context_length({}, None).note
    assert context_length({}, 5000).num_tokens == 5000
