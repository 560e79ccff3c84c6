"""Which loss would these tests catch? Results that are not what was trained: an adapter another tool reads differently,
a merge that computes something else, shards that turn back into another model, a launcher that trains another one.

PEFT and transformers are the judges of adapters, `ferry convert` of shards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ferry
from training import Command, digests, events, flags, losses, settings, train, worst

LOGITS_TOLERANCE = 1e-5
"""Relative to the largest logit: W x + B (A x) and (W + B A) x differ by some hundred roundings of 6e-8."""
TOLERANCE = 1e-6
LORA = {"method": "lora", "lora": {"rank": 4, "alpha": 8}, "lr": 1e-2}
TOKENS = torch.arange(3, 3 + 48).reshape(2, 24)


def logits_of(directory: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def merged_run(small_run: Any, model: Any, place: Path) -> Path:
    """A LoRA run at tp2 pp2 whose adapter was also merged."""
    output = place / "merged-run"
    train(settings(**small_run(model("qwen2"), output, **LORA, tp=2, pp=2, merge=True, steps=8)))
    return output


def test_the_merged_model_computes_what_base_and_adapter_compute_in_peft(merged_run: Path, model: Any) -> None:
    adapted = logits_of(model("qwen2"), merged_run / "adapter")
    assert difference(logits_of(merged_run / "merged"), adapted) <= LOGITS_TOLERANCE
    assert difference(logits_of(model("qwen2")), adapted) > 0.01, "an adapter that changes nothing proves nothing"


def test_the_last_loss_is_the_loss_of_what_was_exported(small_run: Any, model: Any, tmp_path: Path) -> None:
    """A step with a tiny rate measures the model of the step before: it is the merged model's first loss."""
    rows = {"shuffle": False}
    common = {"steps": 1, "rows": rows, "optimizer": {"warmup_steps": 0}}
    trained = small_run(model("llama"), tmp_path / "lora", **{**LORA, **common, "steps": 6}, merge=True)
    train(settings(**trained))
    measured = {**common, "method": "sft", "lr": 1e-9}
    train(settings(**small_run(tmp_path / "lora" / "merged", tmp_path / "merged", **measured)))
    adapted = {**common, **LORA, "lr": 1e-9, "adapter": tmp_path / "lora" / "adapter"}
    train(settings(**small_run(model("llama"), tmp_path / "adapted", **adapted)))
    train(settings(**small_run(model("llama"), tmp_path / "base", **measured)))
    merged, adapter, base = (losses(tmp_path / name)[0] for name in ("merged", "adapted", "base"))
    assert merged == pytest.approx(adapter, rel=TOLERANCE)
    assert merged < base - 0.05


def test_training_goes_on_from_an_adapter(merged_run: Path, small_run: Any, model: Any, tmp_path: Path) -> None:
    options = {**LORA, "adapter": merged_run / "adapter", "steps": 3, "optimizer": {"warmup_steps": 0}}
    for name, layout in (("one", {}), ("two", {"tp": 2})):
        train(settings(**small_run(model("qwen2"), tmp_path / name, **options, **layout)))
    assert worst(losses(tmp_path / "two"), losses(tmp_path / "one")) <= TOLERANCE
    assert losses(tmp_path / "one")[0] < losses(merged_run)[0] - 0.05, "it begins where the adapter was"


@pytest.fixture(scope="module")
def shards(model: Any, place: Path) -> Path:
    """Megatron shards of the tied model, tp2 pp2."""
    target = place / "shards"
    ferry.convert(direction="hf2mg", source=model("qwen2"), target=target, tp=2, pp=2)
    return target


def test_megatron_shards_train_as_the_directory_they_were_made_of(
    shards: Path, small_run: Any, model: Any, tmp_path: Path
) -> None:
    train(settings(**small_run(model("qwen2"), tmp_path / "hf", steps=4)))
    train(settings(**small_run(shards, tmp_path / "megatron", steps=4)))
    assert losses(tmp_path / "megatron") == losses(tmp_path / "hf"), "the same weights, the same bits"


def test_exported_megatron_shards_turn_back_into_the_exported_model(small_run: Any, model: Any, tmp_path: Path) -> None:
    result = train(settings(**small_run(model("qwen2"), tmp_path / "run", steps=4, tp=2, pp=2, export="both")))
    assert set(result["artifacts"]) == {"model", "megatron"}
    back = ferry.convert(direction="mg2hf", source=tmp_path / "run" / "megatron", target=tmp_path / "back")
    assert back["model_sha256"] == result["artifacts"]["model"]["sha256"] == result["model_sha256"]
    assert {file.name for file in (tmp_path / "run" / "model").iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    assert difference(logits_of(tmp_path / "run" / "model"), logits_of(model("qwen2"))) > 1e-3


def test_the_export_is_the_checkpoint(small_run: Any, model: Any, tmp_path: Path) -> None:
    """Layouts round differently, so the masters differ; but the same masters give the same model."""
    from safetensors.torch import load_file

    train(settings(**small_run(model("llama"), tmp_path / "run", steps=2, export="hf")))
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-00000.safetensors")
    weights = {name: tensor for name, tensor in kept.items() if "@" not in name}
    assert set(weights) == set(exported)
    for name, tensor in exported.items():
        assert torch.equal(tensor, weights[name]), name


def test_torchrun_starts_the_same_run(small_run: Any, model: Any, tmp_path: Path) -> None:
    options = {"steps": 4, "tp": 2, "export": "hf"}
    expected = train(settings(**small_run(model("llama"), tmp_path / "crew", **options)))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
                "--master-port", "29613", "-m", "ferry")  # fmt: skip
    command = Command(
        tmp_path / "log", *flags(**small_run(model("llama"), tmp_path / "torchrun", **options)), program=launcher
    )
    assert command.status() == 0, command.text()
    result = json.loads((tmp_path / "torchrun" / "result.json").read_text())
    assert result["model_sha256"] == expected["model_sha256"]
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "crew")
    assert digests(tmp_path / "torchrun") == digests(tmp_path / "crew")


def test_two_nodes_train_one_run_and_the_first_writes_the_results(small_run: Any, model: Any, tmp_path: Path) -> None:
    options = {"steps": 4, "tp": 2, "export": "hf"}
    expected = train(settings(**small_run(model("llama"), tmp_path / "one", **options)))
    words = flags(**small_run(model("llama"), tmp_path / "two", **options))
    nodes = [
        Command(
            tmp_path / f"log-{node}", *words,
            environ={"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"},
        )
        for node in (1, 0)  # the second one first: it waits
    ]  # fmt: skip
    assert [node.status() for node in nodes] == [0, 0], nodes[0].text() + nodes[1].text()
    assert "the first one writes the results" in nodes[0].text()
    assert json.loads((tmp_path / "two" / "result.json").read_text())["model_sha256"] == expected["model_sha256"]
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_run_that_is_done_is_not_done_again(small_run: Any, model: Any, tmp_path: Path) -> None:
    options = small_run(model("llama"), tmp_path / "run", steps=2, export="hf")
    expected = train(settings(**options))
    command = Command(tmp_path / "log", *flags(**options))
    assert command.status() == 0, command.text()
    assert "is done already" in command.text()
    assert len(events(tmp_path / "run", "started")) == 1
    assert expected["model_sha256"][:16] in command.text()


def test_an_inconsistent_recipe_is_said_in_the_plan(small_run: Any, model: Any, tmp_path: Path) -> None:
    """The manual says 8 devices where tp 8 x pp 2 needs 16. The model has 4 heads, so tp is given here."""
    options = small_run(model("llama"), tmp_path / "run", recipe="baichuan2-13b-sft-8192", tp=2)
    command = Command(tmp_path / "log", *flags(**options), "--dry-run")
    assert command.status() == 0, command.text()
    assert "recipe baichuan2-13b-full-8192: tp*pp=16 (tp=8 pp=2) does not divide 8 devices" in command.text()
    assert "baichuan2-13b-full-8192 and baichuan2-13b-lora-8192 look exchanged" in command.text()
    assert "on 4 cpu ranks (tp=2 pp=2 dp=1)" in command.text(), "pp is the recipe's"
