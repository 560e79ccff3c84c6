"""Which loss would these tests catch? A layout that trains another model: a gradient not summed, a slice misplaced, a
mask drawn anew, a norm clipped by a part of itself.

Every layout computes the same sums in another order, so 20 steps agree but for rounding. float32 has 2**-24 = 6e-8 a
rounding; the losses are means of some hundred terms. TOLERANCE is promised; seen: 4e-7.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ferry.core.dtypes import num_bytes
from ferry.core.gather import Sources
from ferry.core.pipeline import pipeline
from ferry.formats.opening import open_checkpoint
from ferry.verbs.train.engine.placement import Rank, places
from training import losses, train, worst

TOLERANCE = 1e-6
NONE, FULL = {"shard": "none"}, {"shard": "full"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "dp2 replicated": {"dp": 2, "layout": NONE},
    "dp2 sharded": {"dp": 2, "layout": FULL},
    "pp2 interleaved": {"pp": 2, "layout": {"vpp": 2}},
    "more tp than kv heads": {"tp": 4},
    "uneven pp2": {"pp": 2, "layout": {"layer_list": (3, 1)}},
    "recompute": {"layout": {"recompute": True}},
    "tp2 dp2 sharded": {"tp": 2, "dp": 2, "layout": FULL},
    "pp2 dp2 sharded": {"pp": 2, "dp": 2, "layout": FULL},
}
Configured = Callable[..., Any]


@pytest.fixture(scope="module")
def alone(model: Callable[[str], Path], configured: Configured, place: Path) -> Callable[..., list[float]]:
    """Losses of one rank, trained once for each setting."""
    kept: dict[str, list[float]] = {}

    def get(name: str, **fields: Any) -> list[float]:
        key = f"{name} {sorted(fields.items())}"
        if key not in kept:
            output = place / f"alone-{len(kept)}"
            train(configured(model(name), output, **fields))
            kept[key] = losses(output)
        return kept[key]

    return get


@pytest.mark.parametrize(("name", "layout"), [
    *(("llama", layout) for layout in ("tp2", "pp2", "tp2 pp2", "dp2 sharded", "pp2 interleaved", "recompute")),
    *(("qwen2", layout) for layout in ("tp2", "pp2", "tp2 pp2", "dp2 replicated")),
    *(pytest.param("qwen2", layout, marks=pytest.mark.slow)
      for layout in ("dp2 sharded", "pp2 interleaved", "uneven pp2", "recompute", "pp2 dp2 sharded")),
    *(pytest.param("llama", layout, marks=pytest.mark.slow)
      for layout in ("dp2 replicated", "uneven pp2", "tp2 dp2 sharded", "pp2 dp2 sharded")),
])  # fmt: skip
def test_20_steps_of_every_layout_have_the_losses_of_one_rank(
    name: str, layout: str, model: Callable[[str], Path], configured: Configured, alone: Any, tmp_path: Path
) -> None:
    expected = alone(name)
    assert expected[-1] < expected[0] - 1.0, "a model that does not learn proves little"
    train(configured(model(name), tmp_path / "run", **LAYOUTS[layout]))
    assert worst(losses(tmp_path / "run"), expected) <= TOLERANCE


@pytest.mark.parametrize(("name", "layout"), [
    ("mixtral", "tp2"), ("llama", "more tp than kv heads"),
    pytest.param("qwen3-moe", "tp2", marks=pytest.mark.slow), pytest.param("qwen3-moe", "pp2", marks=pytest.mark.slow),
    pytest.param("qwen2", "more tp than kv heads", marks=pytest.mark.slow),
])  # fmt: skip
def test_experts_and_shared_key_value_heads_train_as_on_one_rank(
    name: str, layout: str, model: Callable[[str], Path], configured: Configured, alone: Any, tmp_path: Path
) -> None:
    train(configured(model(name), tmp_path / "run", **LAYOUTS[layout], steps=6))
    assert worst(losses(tmp_path / "run"), alone(name, steps=6)) <= TOLERANCE


LORA = {"method": "lora", "lora": {"dropout": 0.1, "rank": 4}, "lr": 1e-2}


@pytest.mark.parametrize("layout", [
    "tp2 pp2", "dp2 replicated",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("dp2 sharded", "recompute", "pp2 interleaved", "more tp than kv heads")),
])  # fmt: skip
def test_lora_with_dropout_draws_the_same_masks_on_every_layout(
    layout: str, model: Callable[[str], Path], configured: Configured, alone: Any, tmp_path: Path
) -> None:
    expected = alone("llama", **LORA)
    assert expected[-1] < expected[0] - 0.1
    assert worst(alone("llama", **{**LORA, "lora": {"rank": 4}}), expected) > 1e-3, "dropout changes something"
    train(configured(model("llama"), tmp_path / "run", **LORA, **LAYOUTS[layout]))
    assert worst(losses(tmp_path / "run"), expected) <= TOLERANCE


@pytest.mark.parametrize("fields", [
    pytest.param({"micro_batch": 4}, marks=pytest.mark.slow), {"rows": {"packing": False}},
    {"seq_len": 512, "micro_batch": 2},
], ids=str)  # fmt: skip
def test_packing_and_micro_batches_change_no_loss(
    fields: dict[str, Any], model: Callable[[str], Path], configured: Configured, alone: Any, tmp_path: Path
) -> None:
    train(configured(model("llama"), tmp_path / "run", **{"seq_len": 256, **fields}))
    assert worst(losses(tmp_path / "run"), alone("llama", seq_len=256)) <= TOLERANCE


def test_each_rank_reads_only_its_slices(model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(model("wide"))
    (chunk,) = pipeline(checkpoint.model.dims.num_layers, 1)
    read = []
    for rank in range(2):
        with Sources(checkpoint.slots) as sources:
            for place in places(checkpoint.model, Rank(2, rank), chunk).values():
                sources.gather(place.local)
            read.append(sources.num_bytes_read)
    whole = sum(num_bytes(slot.dtype, slot.local.shape) for slot in checkpoint.slots)
    assert max(read) < 0.55 * whole, "half of every matrix, and the norms"
