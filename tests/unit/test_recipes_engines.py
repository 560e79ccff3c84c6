"""The table of engines: what is known, how it is known, and which line is meant for a machine."""

from __future__ import annotations

import csv
from importlib.resources import files

import pytest

from ferry.recipes.engines import Verdict, cpu_level, engine_names, runnable, verdicts, verdicts_here

KNOWN = [("compressed-tensors", "W8A8"), ("compressed-tensors", "W4A16"), ("awq", "W4A16"), ("ascend", "W8A8")]


def of(found: tuple[Verdict, ...], engine: str) -> list[Verdict]:
    return [verdict for verdict in found if verdict.engine == engine]


@pytest.mark.parametrize(("format", "scheme"), KNOWN)
def test_every_engine_has_a_verdict_on_every_format(format: str, scheme: str) -> None:
    assert {verdict.engine for verdict in verdicts(format, scheme)} == set(engine_names())


def test_every_line_is_of_a_known_kind_and_every_refusal_says_why() -> None:
    text = files("ferry.recipes").joinpath("engines.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        assert (row["format"], row["scheme"]) in KNOWN
        assert row["activations"] in ("", "token", "tensor")
        assert row["machine"].partition(":")[0] in ("", "cpu", "cc")
        assert row["runs"] == "yes" or row["note"], row


def test_awq_on_a_cpu_with_avx2_is_known_to_load_and_fail() -> None:
    avx2, avx512 = of(verdicts_here("awq", "W4A16", cpu="AVX2"), "vllm-cpu")
    assert (avx2.condition, avx2.runs, avx2.here, avx2.source) == ("AVX2", False, True, "measured")
    assert "first token" in avx2.text
    assert (avx512.runs, avx512.here) == (True, False)


def test_int8_runs_up_to_capability_9_and_not_on_blackwell() -> None:
    def here(capability: float | None) -> list[bool | None]:
        return [v.here for v in of(verdicts_here("compressed-tensors", "W8A8", capability=capability), "vllm-cuda")]

    assert [v.runs for v in of(verdicts("compressed-tensors", "W8A8"), "vllm-cuda")] == [True, False]
    assert here(9.0) == [True, False]
    assert here(10.0) == [False, True]
    assert here(7.0) == [False, False]
    assert here(None) == [None, None]


def test_a_scale_a_tensor_is_not_taken_for_a_scale_a_token() -> None:
    assert [v.runs for v in of(verdicts_here("compressed-tensors", "W8A8", "token", cpu="AVX2"), "vllm-cpu")] == [
        True,
        True,
    ]
    assert [v.runs for v in of(verdicts("compressed-tensors", "W8A8", "tensor"), "vllm-cpu")] == [None]


def test_what_is_not_in_the_table_has_no_verdict() -> None:
    assert verdicts("gptq", "W4A16") == ()


def test_what_an_engine_runs_on_a_cpu_is_named_with_its_format() -> None:
    assert ("compressed-tensors", "W8A8") in runnable("transformers", "AVX2")
    assert ("awq", "W4A16") not in runnable("transformers", "AVX512")
    assert ("awq", "W4A16") not in runnable("vllm-cpu", "AVX2")
    assert ("awq", "W4A16") in runnable("vllm-cpu", "AVX512")


def test_the_level_of_this_cpu_is_one_of_the_table() -> None:
    assert cpu_level() in ("AVX512", "AVX2", "")
