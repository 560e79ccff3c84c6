"""What is refused before calibration: groups, formats, engines, and what a machine does not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferry.core.dtypes import num_bytes
from ferry.core.errors import ConfigError, LayoutError
from ferry.core.family import Model
from ferry.core.quantized import PER_ROW, PER_TENSOR, Integers, Scheme
from ferry.data.windows import TextSpec
from ferry.families.registry import model_of
from ferry.formats.quantized import FORMATS
from ferry.formats.quantized_format import Stored, of_integers
from ferry.verbs.quantize.job import Job
from ferry.verbs.quantize.linears import block_weights, linears, serving_sizes
from ferry.verbs.quantize.preflight import (
    available_memory_bytes,
    check,
    check_engines,
    estimate,
    memory_note,
    try_format,
)

SIZES = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {
    **SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
W8A8, W4A16 = Scheme(8, PER_ROW, True, "token"), Scheme(4, 128, False, "")


def model(**fields: Any) -> Model:
    return model_of({**SIZES, **fields}, "test")


def job(scheme: Scheme = W8A8, format: str = "compressed-tensors", **fields: Any) -> Job:
    start = Job("quantize", Path("model"), Path("out"), format, method="smoothquant", scheme=scheme, calibrate=True)
    return replace(start, **{"evaluate": True, **fields})


def test_linears_are_counted_by_kind_without_embedding_head_and_router() -> None:
    found = {linear.kind: linear for linear in linears(model())}
    assert list(found) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (found["down_proj"].rows, found["down_proj"].cols, found["down_proj"].num_linears) == (512, 1408, 3)
    experts = {linear.kind: linear.num_linears for linear in linears(model_of(MOE, "test"))}
    assert experts["w1"] == experts["w2"] == experts["w3"] == 12
    assert "gate" not in experts


def test_the_weights_of_all_blocks_are_the_weights_of_all_linears() -> None:
    for config in (SIZES, MOE):
        found = model_of(config, "test")
        assert 3 * block_weights(found) == sum(linear.num_weights for linear in linears(found))


def test_a_rank_has_part_of_the_columns_of_what_is_cut_by_column_and_part_of_the_rows_of_the_rest() -> None:
    found = {linear.kind: linear for linear in linears(model())}
    assert found["down_proj"].of_rank(2) == (512, 704)
    assert found["o_proj"].of_rank(2) == (512, 256)
    assert found["up_proj"].of_rank(2) == (704, 512)
    assert found["k_proj"].of_rank(8) == (64, 512), "a key head is copied, not cut"


def test_engines_serve_a_model_with_more_ranks_than_key_heads() -> None:
    assert serving_sizes(model()) == [1, 2, 4, 8]
    assert serving_sizes(model(intermediate_size=1410)) == [1, 2]


@pytest.mark.parametrize(("tp", "fits"), [(1, True), (2, False)])
def test_a_group_must_divide_the_row_of_a_rank(tp: int, fits: bool) -> None:
    if fits:
        check(model(), job(W4A16, tp=tp))
        return
    with pytest.raises(LayoutError, match="use 64 or 32") as caught:
        check(model(), job(W4A16, tp=tp))
    assert "the 704 weights in a row of down_proj of a rank at tp=2" in str(caught.value)


def test_a_format_is_asked_about_the_rows_of_a_rank() -> None:
    narrow = model(intermediate_size=1408 * 2, head_dim=64)
    check(narrow, job(Scheme(4, 32, False, ""), "awq", tp=8))
    odd = model(intermediate_size=32 * 11)  # 352 / 8 = 44 rows of a rank, no multiple of 8
    with pytest.raises(LayoutError, match=r"gate_proj \[44, 512\] of a rank at tp=8") as caught:
        check(odd, job(Scheme(4, 4, False, ""), "awq", tp=8))
    assert caught.value.code == "quantize.format"


def test_a_format_that_cannot_hold_the_scheme_is_refused() -> None:
    with pytest.raises(LayoutError, match="awq holds 4-bit weights"):
        check(model(), job(W8A8, "awq"))


def test_an_engine_that_cannot_run_the_result_is_refused_with_what_it_runs() -> None:
    with pytest.raises(ConfigError, match=r"transformers .*does not run awq W4A16") as caught:
        check_engines(("transformers",), W4A16, "awq")
    assert "--format compressed-tensors with W8A8" in str(caught.value)
    with pytest.raises(ConfigError, match=r"vllm-ascend .*does not run compressed-tensors W4A16"):
        check(model(), job(W4A16, targets=("vllm-ascend",)))


def test_four_bits_are_refused_for_the_cpu_engine_on_avx2_with_what_runs_there() -> None:
    with pytest.raises(ConfigError, match=r"vllm-cpu \(AVX2\) does not run awq W4A16: it loads and fails") as caught:
        check_engines(("vllm-cpu",), W4A16, "awq", cpu="AVX2")
    assert "it runs --format compressed-tensors with W8A8; awq W4A16 runs in vllm-cuda" in str(caught.value)
    check_engines(("vllm-cpu",), W4A16, "awq", cpu="AVX512")


def test_a_condition_this_machine_cannot_see_is_told_and_not_refused() -> None:
    notes = check_engines(("vllm-cuda",), W8A8, "compressed-tensors")
    assert any("Blackwell" in note and "does not run" in note for note in notes)
    assert any("7.5" in note and "runs" in note for note in notes)


def test_what_nobody_knows_is_told_as_such() -> None:
    (note,) = check_engines(("vllm-ascend",), W4A16, "awq")
    assert "not known" in note


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("compressed-tensors", W8A8),
        ("compressed-tensors", Scheme(8, PER_TENSOR, True, "tensor")),
        ("compressed-tensors", W4A16),
        ("compressed-tensors", Scheme(4, 32, True, "")),
        ("awq", W4A16),
        ("ascend", W8A8),
    ],
)
def test_every_format_is_tried_on_small_linears(format: str, scheme: Scheme) -> None:
    try_format(linears(model()), scheme, FORMATS[format])


def test_a_format_that_writes_other_shapes_than_it_promises_is_found_before_calibration() -> None:
    def encode(module: str, integers: Integers) -> dict[str, Stored]:
        stored = FORMATS["compressed-tensors"].encode(module, integers)
        return {**stored, f"{module}.weight": of_integers(np.ascontiguousarray(integers.values.T), "I8")}

    with pytest.raises(AssertionError, match="promises"):
        try_format(linears(model()), W8A8, replace(FORMATS["compressed-tensors"], encode=encode))


def test_the_disk_estimate_is_the_sum_of_what_is_stored() -> None:
    found = model()
    weights = sum(linear.num_weights for linear in linears(found))
    scales = sum(linear.rows * linear.num_linears for linear in linears(found))
    rest = sum(num_bytes("BF16", shape) for shape in found.canonical().values()) - 2 * weights
    rtn = job(method="rtn", calibrate=False, evaluate=False)
    assert estimate(found, rtn, "BF16", "BF16").disk_bytes == weights + 2 * scales + rest
    states = 2 * 16 * 512 * 512 * 4
    assert estimate(found, job(), "BF16", "BF16").disk_bytes == weights + 2 * scales + rest + states
    assert estimate(found, job(write=False, evaluate=False), "BF16", "BF16").disk_bytes == states


def test_the_memory_of_a_calibrated_job_does_not_grow_with_the_number_of_layers() -> None:
    few, many = (estimate(model(num_hidden_layers=n), job(), "BF16", "BF16").peak_memory_bytes for n in (2, 40))
    assert few == many
    wide = estimate(model(hidden_size=1024), job(), "BF16", "BF16").peak_memory_bytes
    assert wide > many


def test_memory_does_not_grow_with_calibration_text_which_lies_on_the_disk() -> None:
    few, many = (estimate(model(), job(text=TextSpec(num_windows=number)), "BF16", "BF16") for number in (16, 512))
    assert few.peak_memory_bytes == many.peak_memory_bytes
    assert many.disk_bytes - few.disk_bytes == 2 * (512 - 16) * 512 * 512 * 4


def test_rtn_takes_the_memory_of_one_weight() -> None:
    found = estimate(model(), job(method="rtn", calibrate=False, evaluate=False), "BF16", "BF16")
    assert dict(found.parts)["one weight while it is rounded"] == 512 * 1408 * 12


def test_too_little_memory_is_told_with_its_largest_part() -> None:
    found = estimate(model(), job(), "BF16", "BF16")
    assert memory_note(found, found.peak_memory_bytes) == ()
    (note,) = memory_note(found, found.peak_memory_bytes - 1)
    assert "Python and torch take 360 MB" in note
    assert 0 < available_memory_bytes() < 1 << 50
