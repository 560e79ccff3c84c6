"""megatron-core itself is the judge: it loads what Ferry writes, and Ferry reads what it writes.

Expected: at TP1 in float32 the logits are those of transformers bit for bit (experts: their sums have another order);
at TP>1 partial sums have another order, so at most 1e-3 apart with the same most likely token everywhere. The models
are built from the `args` in Ferry's shards, so these are judged too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from judge.run import agreement, megatron_logits, megatron_write, transformers_logits
from test_judge import MODELS, MOE, model_directory  # noqa: F401  (a fixture)

import ferry

TOLERANCE = 1e-3
LAYOUTS = {
    "one rank": {"tp": 1, "pp": 1},
    "pipeline": {"tp": 1, "pp": 2},
    "tensor and pipeline": {"tp": 2, "pp": 2},
    "virtual": {"tp": 2, "pp": 2, "vpp": 2},
    "uneven": {"tp": 1, "pp": 2, "layer_list": (1, 3)},
}


def judged(checkpoint: Path, hf_dir: Path, layout: dict, **extra) -> tuple[float, float]:
    layout = {key: list(value) if key == "layer_list" else value for key, value in layout.items()}
    logits = megatron_logits(checkpoint, hf_dir, **layout, fields="args", **extra)
    return agreement(logits, transformers_logits(hf_dir))


def assert_agrees(found: tuple[float, float], exact: bool) -> None:
    difference, top1 = found
    assert top1 == 1.0
    assert difference == 0.0 if exact else difference < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in MOE])
def test_megatron_core_computes_the_same_from_our_shards(name, layout, model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory(name)
    ferry.convert(direction="hf2mg", source=hf_dir, target=tmp_path / "mg", vocab_multiple=1, **LAYOUTS[layout])
    assert_agrees(judged(tmp_path / "mg", hf_dir, LAYOUTS[layout]), exact=LAYOUTS[layout]["tp"] == 1)


@pytest.mark.parametrize("experts", ["sequential", "grouped"])
@pytest.mark.parametrize("name", MOE)
def test_megatron_core_computes_the_same_with_experts(name, experts, model_directory, tmp_path):  # noqa: F811
    hf_dir, layout = model_directory(name), {"tp": 2, "pp": 1, "ep": 2}
    ferry.convert(direction="hf2mg", source=hf_dir, target=tmp_path / "mg", experts=experts, **layout)
    found = judged(tmp_path / "mg", hf_dir, layout, grouped_gemm=experts == "grouped")
    assert_agrees(found, exact=False)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 2), (1, 3)])
def test_the_real_model_gives_the_same_logits_in_megatron_core(tp, pp, smollm2, tmp_path):
    ferry.convert(direction="hf2mg", source=smollm2, target=tmp_path / "mg", tp=tp, pp=pp)
    assert_agrees(judged(tmp_path / "mg", smollm2, {"tp": tp, "pp": pp}), exact=tp == 1)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "qwen3-moe"])
def test_our_distributed_checkpoint_loads_in_another_layout_than_it_was_cut_for(name, model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory(name)
    ferry.convert(
        direction="hf2mg", source=hf_dir, target=tmp_path / "mg", tp=2, pp=2, format="torch_dist", vocab_multiple=1
    )
    logits = megatron_logits(tmp_path / "mg", hf_dir, tp=1, pp=1, fmt="torch_dist")
    assert_agrees(agreement(logits, transformers_logits(hf_dir)), exact=name not in MOE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [{"tp": 1, "pp": 1}, {"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "vpp": 2}], ids=str)
def test_we_read_the_shards_that_megatron_core_wrote(name, layout, model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory(name)
    if name in MOE:
        layout = {"tp": layout["tp"], "pp": 1, "ep": layout["pp"]}
    megatron_write(hf_dir, tmp_path / "mg", **layout)
    ferry.convert(direction="mg2hf", source=tmp_path / "mg", target=tmp_path / "hf", hf_assets=hf_dir)
    result = ferry.verify(path=tmp_path / "hf", against=hf_dir)
    assert result["same"] is True
