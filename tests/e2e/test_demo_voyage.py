"""The one story end to end: the demo voyage through the command line, as a stranger makes it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from surroundings import SMOLLM2_SHA256, without_hub

DEMO = Path(__file__).parents[2] / "examples" / "demo.yaml"
STEPS = [
    "model", "look", "ask-before", "shards", "verify-shards", "reshard", "back", "verify-back", "ask-after", "text",
    "perplexity-before", "train", "train-pp2", "same-losses", "perplexity-after", "verify-merged", "ask-trained",
    "quantized", "verify-quantized", "ask-quantized", "perplexity-quantized",
    "served", "served-under-schema",
]  # fmt: skip
CHANGED = {"train", "train-pp2", "verify-merged", "quantized", "verify-quantized"}
"""Steps whose model is another one, and says so."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo-voyage"


def run(output: Path, home: Path) -> dict[str, Any]:
    environment = without_hub(os.environ) | {"FERRY_HOME": str(home)}
    command = [sys.executable, "-m", "ferry", "run", str(DEMO), "--output", str(output), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.timeout(1400)  # six to ten minutes on two quiet cores with AVX2, half of it with bfloat16 in hardware
def test_a_real_model_goes_to_megatron_shards_and_comes_home_bit_for_bit(
    output: Path, smollm2: Path, test_cache: Path
) -> None:
    result = run(output, test_cache / "home")
    assert result["verdict"] == "Nothing was lost: 272 of 272 tensors bit for bit"
    steps = {entry["name"]: entry for entry in result["steps"]}
    assert list(steps) == STEPS
    assert {entry["status"] for entry in steps.values()} == {"done"}
    fingerprints = {entry["result"].get("model_sha256") for name, entry in steps.items() if name not in CHANGED}
    assert fingerprints - {None} == {SMOLLM2_SHA256}
    assert "Paris" in steps["ask-after"]["result"]["answer"]
    assert len(result["gates"]) == 18
    assert all(gate["holds"] for gate in result["gates"])


def test_the_fine_tuning_learns_and_is_the_same_on_two_layouts(output: Path, smollm2: Path, test_cache: Path) -> None:
    steps = {entry["name"]: entry["result"] for entry in run(output, test_cache / "home")["steps"]}
    assert steps["perplexity-after"]["perplexity"] < 0.9 * steps["perplexity-before"]["perplexity"]
    assert steps["train"]["validation_loss"] < steps["train"]["validation_loss_before"]
    assert steps["same-losses"]["curves"]["num_common_steps"] == 4
    assert steps["same-losses"]["curves"]["max_loss_difference"] <= 1e-5
    # transformers, on its own, finds the loss on the held-out rows that Ferry's validation found.
    judged = math.log(steps["perplexity-before"]["perplexity"])
    assert abs(judged - steps["train"]["validation_loss_before"]) < 1e-4


def test_the_quantized_model_answers_and_transformers_finds_it_as_near_as_its_proof_says(
    output: Path, smollm2: Path, test_cache: Path
) -> None:
    steps = {entry["name"]: entry["result"] for entry in run(output, test_cache / "home")["steps"]}
    made, judged = steps["quantized"], steps["perplexity-quantized"]
    assert made["passed"]
    assert made["bytes"] < 0.65 * made["bytes_original"]
    assert steps["ask-quantized"]["answer"]
    # Other text and another judge: the same order of magnitude, and neither of them nothing.
    assert 0.1 * made["kl"] < judged["kl"] < 10 * made["kl"]
    assert judged["perplexity_original"] == pytest.approx(steps["perplexity-after"]["perplexity"], rel=1e-6)


def test_the_served_model_answers_as_transformers_does_and_keeps_a_schema(
    output: Path, smollm2: Path, test_cache: Path
) -> None:
    steps = {entry["name"]: entry["result"] for entry in run(output, test_cache / "home")["steps"]}
    assert steps["served"]["answer"] == steps["ask-trained"]["answer"]
    schema = json.loads((DEMO.parent / "character.schema.json").read_text(encoding="utf-8"))
    answer = json.loads(steps["served-under-schema"]["answer"])
    jsonschema.validate(answer, schema)
    assert steps["served-under-schema"]["guided"]["valid"]


def test_the_second_voyage_makes_nothing_again(output: Path, smollm2: Path, test_cache: Path) -> None:
    result = run(output, test_cache / "home")
    assert {entry["status"] for entry in result["steps"]} == {"skipped"}
    assert result["seconds"] == 0


def test_the_report_shows_everything_and_needs_nothing_else(output: Path) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    for text in (
        "Nothing was lost: 272 of 272 tensors bit for bit",
        SMOLLM2_SHA256,
        "TP3 × PP2",
        "TP1 × PP3",
        "What is the capital of France?",
        "the same answer",
        "logits equal bit for bit",
        "loss by step",
        "held-out perplexity after",
        "KL to the original",
        "Describe a knight",
        "steps.back.model_sha256 == steps.model.model_sha256",
        "model.layers.29.mlp.down_proj.weight",
        *STEPS,
    ):
        assert text in page
    assert "<script" not in page
    own_page = 'href="quantized/quantization.html"'
    assert own_page in page
    assert not re.search(r"""(src|href)\s*=|url\((?!#)|@import""", page.replace(own_page, ""))
    assert str(output) not in page
