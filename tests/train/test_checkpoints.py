"""Which loss would these tests catch? A damaged checkpoint that is loaded, a good one that is not, a full disk that
nobody hears of, and a run that goes on differently on another layout.

Each damage is done to real files between two runs. The judge is the run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ferry.core.errors import OutputError
from ferry.formats import training
from training import Command, digests, events, flags, lines, losses, settings, train, worst

STEPS, SAVE_EVERY, SAVED = 8, 2, "step-00000004"
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def undisturbed(small_run: Any, model: Any, place: Path) -> Path:
    """A run of 8 steps at tp2, all of whose checkpoints are kept."""
    output = place / "undisturbed"
    train(settings(**options(small_run, model, output)))
    return output


def options(small_run: Any, model: Any, output: Path, **fields: Any) -> dict[str, Any]:
    keep = {"checkpoint": {"keep": 9}, "save_every": SAVE_EVERY, "steps": STEPS, "tp": 2}
    return small_run(model("small"), output, **{**keep, **fields})  # type: ignore[no-any-return]


def stopped_at_four(undisturbed: Path, target: Path) -> Path:
    """Return a copy of the run as it was after step 4: checkpoints of steps 2 and 4."""
    shutil.copytree(undisturbed, target)
    for step in (6, 8):
        shutil.rmtree(target / "checkpoints" / training.step_name(step))
    return target


def flip(path: Path, at: int) -> None:
    """Turn over one bit of a file; `at` may count from its end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other_step(directory: Path) -> None:
    """A document that belongs to another checkpoint: a stale copy."""
    shutil.copyfile(directory.parent / "step-00000002" / "state.json", directory / "state.json")


TENSORS, RANK, STATE = "rank-00001.safetensors", "rank-00001.json", "state.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the document is missing": (lambda d: (d / STATE).unlink(), "state.json: No such file"),
    "the document is cut": (lambda d: truncate(d / STATE), "state.json cannot be read"),
    "a bit of the document": (lambda d: flip(d / STATE, -200), "state.json"),
    "the document of another step": (other_step, "was altered"),
    "the tensors of a rank are cut": (lambda d: truncate(d / TENSORS), TENSORS),
    "the tensors of a rank are missing": (lambda d: (d / TENSORS).unlink(), TENSORS),
    "the tensors of a rank are empty": (lambda d: (d / TENSORS).write_bytes(b""), TENSORS),
    "a bit of the first tensor": (lambda d: flip(d / TENSORS, 100_000), "differs from its digest"),
    "a bit of the last tensor": (lambda d: flip(d / TENSORS, -1), "differs from its digest"),
    "a bit of the header": (lambda d: flip(d / TENSORS, 60), TENSORS),
    "a bit of the description": (lambda d: flip(d / RANK, -100), f"{RANK} was altered"),
    "the description is missing": (lambda d: (d / RANK).unlink(), f"{RANK}: No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_rejected_by_name_and_reason(undisturbed: Path, tmp_path: Path, damage: str) -> None:
    run = stopped_at_four(undisturbed, tmp_path / "run")
    training.verify(run / "checkpoints" / SAVED)
    inflict, reason = DAMAGES[damage]
    inflict(run / "checkpoints" / SAVED)
    with pytest.raises(training.IntegrityError, match=reason.replace(".", r"\.")):
        training.verify(run / "checkpoints" / SAVED)


QUICK = ("the document is missing", "a bit of the last tensor", "the description is missing")


@pytest.mark.parametrize("damage", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES
])  # fmt: skip
def test_the_last_good_checkpoint_is_used_instead_and_the_result_is_the_same(
    undisturbed: Path, small_run: Any, model: Any, tmp_path: Path, damage: str
) -> None:
    run = stopped_at_four(undisturbed, tmp_path / "run")
    inflict, reason = DAMAGES[damage]
    inflict(run / "checkpoints" / SAVED)
    train(settings(**options(small_run, model, run)))
    (rejected,) = events(run, "rejected")
    assert rejected["step"] == 4
    assert reason in rejected["reason"]
    assert [event["step"] for event in events(run, "resumed")] == [2, 2], "both ranks"
    assert (digests(run), losses(run)) == (digests(undisturbed), losses(undisturbed))


def test_without_a_good_checkpoint_the_run_begins_at_the_beginning_and_says_so(
    undisturbed: Path, small_run: Any, model: Any, tmp_path: Path
) -> None:
    run = stopped_at_four(undisturbed, tmp_path / "run")
    for name in ("step-00000002", SAVED):
        flip(run / "checkpoints" / name / TENSORS, -1)
    half_written = run / "checkpoints" / "step-00000006.partial-of-an-earlier-life"
    shutil.copytree(run / "checkpoints" / SAVED, half_written)
    num_fresh = len(events(run, "fresh"))
    train(settings(**options(small_run, model, run)))
    assert [event["step"] for event in events(run, "rejected")] == [4, 2]
    assert len(events(run, "fresh")) == num_fresh + 2
    assert not events(run, "resumed")
    assert not half_written.exists()
    assert (digests(run), losses(run)) == (digests(undisturbed), losses(undisturbed))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB: room for one checkpoint and a half."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; the next test limits file sizes instead")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=36m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine may not mount; the next test limits file sizes instead")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_stays(
    small_disk: Path, undisturbed: Path, small_run: Any, model: Any
) -> None:
    output = small_disk / "run"
    fields = options(small_run, model, output, checkpoint={"keep": 1})
    with pytest.raises(OutputError, match="No space left on device") as found:
        train(settings(**fields))
    assert found.value.code == "output.disk-full"
    assert training.list_steps(output / "checkpoints") == [2]
    training.verify(output / "checkpoints" / "step-00000002")
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    train(settings(**fields))
    assert events(output, "resumed")[-1]["step"] == 2
    assert (digests(output), losses(output)) == (digests(undisturbed), losses(undisturbed))


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_error_of_a_save_ends_the_command_with_its_cause(
    asynchronous: bool, small_run: Any, model: Any, tmp_path: Path
) -> None:
    """The limit of a file's size stands for a disk that takes no more: `ulimit -f` is in blocks of 1024 bytes."""
    fields = options(small_run, model, tmp_path / "run", tp=1, checkpoint={"keep": 1, "asynchronous": asynchronous})
    limited = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
        "runpy.run_module('ferry', run_name='__main__')"
    )
    command = Command(tmp_path / "log", *flags(**fields), program=("-c", limited))
    assert command.status() == 6, command.text()
    assert "cannot write a checkpoint" in command.text()
    assert "File too large" in command.text()
    done = lines(tmp_path / "run" / "metrics.jsonl")
    assert done[-1]["step"] < 2 * SAVE_EVERY, "the next step, or the next save, does not begin"
    assert not training.list_steps(tmp_path / "run" / "checkpoints")
    assert events(tmp_path / "run", "failed")


PLAN = [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "layout": {"shard": "full"}}]
"""Five steps on each, then the next layout goes on."""
METHODS: dict[str, dict[str, Any]] = {
    "sft": {}, "lora": {"method": "lora", "lora": {"dropout": 0.1}, "lr": 1e-2}, "pretrain": {"method": "pretrain"},
}  # fmt: skip


@pytest.mark.parametrize(
    "method", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "pretrain"))]
)
def test_a_run_that_moves_from_layout_to_layout_has_the_losses_of_one_that_does_not(
    method: str, small_run: Any, model: Any, documents: Path, tmp_path: Path
) -> None:
    data = {"data": (str(documents),)} if method == "pretrain" else {}
    common = {"optimizer": {"schedule": "constant", "warmup_steps": 0}, **METHODS[method], **data}
    train(settings(**small_run(model("qwen2"), tmp_path / "one", **common)))
    for number, layout in enumerate(PLAN, 1):
        train(settings(**small_run(model("qwen2"), tmp_path / "moved", **{**common, "steps": 5 * number, **layout})))
    assert worst(losses(tmp_path / "moved"), losses(tmp_path / "one")) <= TOLERANCE
    assert sorted({event["step"] for event in events(tmp_path / "moved", "resumed")}) == [5, 10, 15]


def test_what_a_checkpoint_says_of_itself_is_the_data_position_and_the_schedule(undisturbed: Path) -> None:
    state = training.read_state(undisturbed / "checkpoints" / SAVED)
    config = json.loads((undisturbed / "run.json").read_text())["config"]
    assert state.values["num_updates"] == state.values["rng"]["step"] == state.step == 4
    assert state.values["data"]["next_sample"] == 4 * config["global_batch"]
    assert state.values["rng"]["seed"] == config["seed"]
