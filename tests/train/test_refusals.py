"""Which loss would these tests catch? An hour of waiting for a mistake that could be told at once, or a mistake that is
told in words nobody can act on.

The command runs, forked from the test but for one. Its exit status and code are a promise; nothing is written where
nothing began.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ferry.formats import training
from forked import REAL
from training import Command, events, flags, lines, settings, tiny, train

Refused = Callable[..., str]


@pytest.fixture
def refused(small_run: Any, model: Any, tmp_path: Path) -> Refused:
    """Run the command; it must end with this status and code, say these words, and leave no output."""

    def run(status: int, code: str, *words: str, **fields: Any) -> str:
        options = small_run(**{"model": model("llama"), "output": tmp_path / "out", "steps": 2, **fields})
        before = sorted(path for path in tmp_path.rglob("*") if path.name != "log")
        command = Command(tmp_path / "log", *flags(**options))
        assert command.status() == status, command.text()
        last = command.text().rstrip().split("\n")[-1]
        assert last.startswith("error: ")
        assert last.endswith(f"[{code}]")
        for word in words:
            assert word in last
        assert sorted(path for path in tmp_path.rglob("*") if path.name != "log") == before, "nothing is written"
        return last

    return run


def test_an_impossible_mesh_is_refused_with_the_possible_ones(refused: Refused) -> None:
    refused(4, "mesh.tp", "tp=3 does not divide num_heads=4", "use 1, 2 or 4", tp=3)
    refused(4, "mesh.pp", "pp=3 does not divide num_layers=4", "use 1, 2 or 4", pp=3)


def test_rows_longer_than_the_model_are_refused_with_its_limit(refused: Refused) -> None:
    refused(2, "mesh.seq-len", "seq_len=1024", "max_positions=512", "use at most 512", seq_len=1024)


def test_what_cannot_fit_is_refused_with_its_largest_part_and_what_to_lower(refused: Refused) -> None:
    words = ("the largest part is activations", "lower --micro-batch or --seq-len")
    refused(2, "train.memory", *words, micro_batch=1_000_000_000)


def test_data_that_is_not_there_is_refused(refused: Refused, tmp_path: Path) -> None:
    refused(3, "data.missing", "nothere.jsonl is not there", data=(str(tmp_path / "nothere.jsonl"),))


def test_empty_data_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    refused(3, "data.empty", "empty.jsonl holds no row", data=(str(tmp_path / "empty.jsonl"),))


def test_malformed_rows_are_refused_by_line_above_the_threshold(refused: Refused, chats: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + '{"messages": 3}\nnot json\n{"messages": [{"role": "user"}]}\n')
    words = ("rows are bad", "at most 1.00%", "bad.jsonl:41", "bad.jsonl:42 not JSON", "bad.jsonl:43")
    refused(8, "data.bad-rows", *words, data=(str(bad),))


def test_an_unknown_handler_or_recipe_is_refused_with_what_there_is(refused: Refused) -> None:
    refused(2, "data.handler", "unknown handler 'FooHandler'", "MOSSMultiTurnHandler", rows={"handler": "FooHandler"})
    refused(3, "recipes.unknown", "no recipe 'llama9-7b'", recipe="llama9-7b")


def test_an_output_that_is_something_else_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(6, "output.exists", "is a file, expected a directory", output=tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter").write_text("mine")
    refused(6, "output.exists", "exists and holds no training run", output=tmp_path / "folder")
    refused(6, "output.exists", "holds no training run", output=tmp_path / "folder", overwrite=True)


@pytest.fixture(scope="module")
def lora_run(small_run: Any, model: Any, place: Path) -> Path:
    """A small LoRA run, for its adapter."""
    output = place / "lora-run"
    train(settings(**small_run(model("llama"), output, method="lora", steps=2)))
    return output


def test_another_run_in_the_output_is_refused_with_the_difference(refused: Refused, lora_run: Path) -> None:
    same = {"method": "lora", "output": lora_run}
    refused(6, "output.exists", "a run with other settings", "lr 0.001 -> 0.5", **same, lr=0.5)
    refused(6, "output.exists", "lora.rank 8 -> 4", **same, lora={"rank": 4})


def test_the_adapter_of_another_base_is_refused(
    refused: Refused, lora_run: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of the same sizes, without a manifest: only the weights tell."""
    other = tiny("Llama", smollm2, tmp_path_factory.mktemp("other") / "model", rope_theta=20_000.0)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    adapter = {"method": "lora", "adapter": lora_run / "adapter"}
    refused(5, "lora.base", "was trained on llama", "is another model", model=other, **adapter)


def test_an_adapter_of_another_rank_or_scale_is_refused(refused: Refused, lora_run: Path) -> None:
    adapter = {"method": "lora", "adapter": lora_run / "adapter"}
    refused(2, "train.adapter-rank", "has rank 8, lora.rank is 4", **adapter, lora={"rank": 4})
    refused(2, "train.adapter-scale", "is scaled by 2,", "make 4", **adapter, lora={"alpha": 32})


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_samples(
    small_run: Any, model: Any, tmp_path: Path
) -> None:
    options = small_run(model("small"), tmp_path / "run", steps=6, save_every=1, lr=1e30,
                        optimizer={"schedule": "linear", "warmup_steps": 0})  # fmt: skip
    command = Command(tmp_path / "log", *flags(**options))
    assert command.status() == 8, command.text()
    last = command.text().rstrip().split("\n")[-1]
    assert "of step 2 is not finite" in last
    assert "samples 4 to 7 in training order" in last
    assert last.endswith("[train.not-finite]")
    assert not events(tmp_path / "run", "restart"), "another try would end the same way"
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert training.list_steps(tmp_path / "run" / "checkpoints") == [1]
    training.verify(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert (tmp_path / "run" / "report.html").exists()


def test_a_model_with_an_infinite_weight_fails_at_the_first_step(small_run: Any, model: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model("small"), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"loss of step 1 is not finite .* samples 0 to 3") as found:
        train(settings(**small_run(broken, tmp_path / "run", tp=2)))
    assert found.value.code == "train.not-finite"  # type: ignore[attr-defined]
    assert not training.list_steps(tmp_path / "run" / "checkpoints")


def test_a_dry_run_writes_nothing_and_says_what_it_would_do(small_run: Any, model: Any, tmp_path: Path) -> None:
    command = Command(
        tmp_path / "log", *flags(**small_run(model("llama"), tmp_path / "run", tp=2)), "--dry-run", "--json",
        program=REAL,
    )  # fmt: skip
    assert command.status() == 0, command.text()
    document = json.loads(command.text())
    assert document["details"]["mesh"] == {"tp": 2, "pp": 1, "vpp": 1, "dp": 1} if "details" in document else document
    assert not (tmp_path / "run").exists()
