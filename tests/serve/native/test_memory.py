"""How large the cache is made, and what is said where it cannot be large enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferry.core.errors import ConfigError
from ferry.engines.engine import EngineSettings
from ferry.engines.native.memory import Memory, Room, memory_now, room
from native.reading import Reader

GB = 10**9
TOKEN_BYTES = 100_000


class Large(Reader):
    """A model of ordinary size: 2 GB of weights, 100 kB of keys and values a token."""

    weights_bytes = 2 * GB

    def __init__(self, max_model_len: int) -> None:
        super().__init__(block_size=16, max_model_len=max_model_len)
        self.block_bytes = 16 * TOKEN_BYTES


def decide(model_len: int, **settings: Any) -> Room:
    memory = Memory(total_bytes=16 * GB, free_bytes=12 * GB, used_bytes=GB)
    return room(Large(model_len), EngineSettings(Path("none"), **settings), memory)


def test_by_default_there_is_room_for_32_usual_answers_or_one_longest() -> None:
    assert decide(2048).num_blocks == 2048
    assert decide(40960).num_blocks == 2560


def test_by_default_half_of_what_is_free_is_the_most_and_the_context_is_what_fits() -> None:
    found = decide(131_072)
    assert found.num_blocks == 3750
    assert found.max_model_len == 60_000
    assert "max_model_len 131,072 -> 60,000" in found.notes[0]


def test_a_size_is_taken_as_it_is() -> None:
    assert decide(2048, kv_cache_memory_bytes=GB).num_blocks == 625


def test_a_share_of_the_memory_is_without_weights_and_a_step() -> None:
    found = decide(2048, gpu_memory_utilization=0.5)
    assert 8 * GB - 2 * GB - found.num_blocks * 16 * TOKEN_BYTES == pytest.approx(256 * 2**20, rel=0.01)


def test_a_longer_step_leaves_less_to_the_cache() -> None:
    usual, long = (decide(2048, gpu_memory_utilization=0.5, max_num_batched_tokens=size) for size in (256, 1_000_256))
    assert (usual.num_blocks - long.num_blocks) * 16 * TOKEN_BYTES == pytest.approx(GB, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "repair"),
    [
        ({"kv_cache_memory_bytes": GB}, "lower --max-model-len to at most 10000, or raise it to 4.096 GB"),
        ({"gpu_memory_utilization": 0.3}, "lower --max-model-len to at most 25"),
        ({"gpu_memory_utilization": 0.1}, "raise it"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(settings: dict[str, Any], repair: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decide(40_960, max_model_len=40_960, **settings)
    assert caught.value.code == "engine.cache-too-small"
    assert caught.value.repair.startswith(repair)


def test_the_machine_says_what_it_has() -> None:
    memory = memory_now()
    assert 0 < memory.used_bytes < memory.total_bytes
    assert 0 < memory.free_bytes <= memory.total_bytes
