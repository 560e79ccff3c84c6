"""The screen after `ferry quantize`, and its exit status. Which loss would this catch? A bad model taken for a good one
by a script, a screen that hides which limit is broken."""

from __future__ import annotations

import math
from typing import Any

from ferry.verbs.quantize.report import bars, exit_status, report
from quantized_proofs import broken, data_free, layer, proof


def result(action: str = "quantize", **fields: Any) -> dict[str, Any]:
    return {
        "action": action, "artifact": "out", "proof": None, "passed": True, "page": None, "scales": None,
        "bytes": 163_000_000, "bytes_original": 269_060_552, "model_sha256": "5" * 64, "choices": [], "changes": [],
        **fields,
    }  # fmt: skip


def test_a_model_beyond_its_limits_ends_with_status_1() -> None:
    assert exit_status(result(proof=proof())) == 0
    assert exit_status(result(proof=broken(), passed=False)) == 1
    assert exit_status({"action": "dequantize"}) == 0, "what has no limits passes"


def test_the_screen_says_what_was_made_how_far_it_is_and_where_the_proof_is() -> None:
    lines = report(result(proof=proof(), page="out/quantization.html")).splitlines()
    assert lines[0] == "quantized smol: SmoothQuant, W8A8, compressed-tensors -> out"
    assert lines[1] == "  size        269.1 MB -> 163 MB (61%)"
    assert lines[2] == "  KL          0.0108 (at most 0.05)"
    assert lines[3] == "  top-1       93.5 % (at least 88 %)"
    assert lines[4] == "  perplexity  24.33 -> 24.45, ratio 1.005 (at most 1.03)"
    assert lines[5] == "  layers      ▁▅█ NMSE 1.1e-5 to 3.3e-5"
    assert lines[6] == "  worst       model.layers.0.mlp.down_proj  NMSE 2.5e-3"
    assert lines[-2:] == [f"  sha256      {'5' * 64}", "  page        out/quantization.html"]


def test_a_broken_limit_is_named_and_the_others_are_not() -> None:
    text = report(result(proof=broken(), passed=False))
    assert text.count("NOT") == 1
    assert "  KL          0.31 - NOT at most 0.05" in text
    assert text.endswith("the model was made, and is beyond its limits: the exit status is 1")


def test_a_model_without_held_out_text_is_said_to_be_unmeasured() -> None:
    text = report(result(proof=data_free()))
    assert "not measured on text" in text
    assert "worst       model.layers.0.self_attn.q_proj  NMSE 3.5e-5" in text
    assert "KL" not in text


def test_layers_in_float_and_experts_that_fell_back_are_counted() -> None:
    layers = [layer(0), layer(1)]
    layers[0]["linears"][2] |= {"scheme": "float", "nmse": None}
    text = report(result(proof=proof(layers=layers, experts=proof(2, 4)["experts"])))
    assert "in float    1 of 14 linear layers" in text
    assert "experts     2 of 8 saw too few tokens" in text


def test_each_action_says_what_it_did() -> None:
    assert report(result("scales", artifact=None, scales="s.safetensors")).startswith("made scales -> s.safetensors")
    assert report(result("dequantize")).startswith("made float again -> out")
    assert report(result("repack", proof=proof(format="awq"))).startswith("the same integers as awq -> out")


def test_changes_and_choices_are_told_once_each() -> None:
    lines = report(result(changes=["weights rounded"], choices=["weights rounded", "group 64"])).splitlines()
    assert lines[-2:] == ["changed: weights rounded", "note: group 64"]


def test_bars_are_logarithmic_keep_the_largest_and_leave_gaps() -> None:
    assert bars([1e-6, 1e-4, 1e-2]) == "▁▅█"
    assert bars([1e-4] * 79 + [1e-2], 40) == "▁" * 39 + "█"
    assert bars([1e-4, None, math.nan, 1e-2]) == "▁  █"
    assert bars([0.0, 1e-3]) == "▁▁"
    assert bars([]) == ""
