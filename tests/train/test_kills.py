"""Which loss would these tests catch? A kill that costs more than the save interval, or changes one bit of the result.

The command runs, forked from the test but for one, and a real signal ends a worker of it, at a moment drawn from a seed
or inside a save. The judge is a run that nobody disturbed: its exported model, and every tensor of its last checkpoint,
moments included.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ferry.formats import training
from forked import REAL
from training import Command, digests, events, flags, lines, losses, settings, train

STEPS, SAVE_EVERY = 18, 3
LATEST_S = 1.6
"""Kills fall up to so long after the start of a generation: into loading, steps and saves."""
POLL = threading.Event()
LAYOUTS: dict[str, dict[str, Any]] = {
    "sft alone": {"model": "small"},
    "sft tp2": {"model": "small", "tp": 2},
    "sft pp2 tied": {"model": "small-tied", "pp": 2},
    "sft dp2 sharded": {"model": "small", "dp": 2},
    "lora dp2": {"model": "wide", "dp": 2, "method": "lora", "lora": {"dropout": 0.1}},
    "lora pp2": {"model": "wide", "pp": 2, "method": "lora"},
}


class Case:
    """One run that is disturbed, and what it must come to."""

    def __init__(
        self, small_run: Callable[..., dict[str, Any]], model: Callable[[str], Path], top: Path, name: str
    ) -> None:
        fields = {**LAYOUTS[name], "steps": STEPS, "save_every": SAVE_EVERY, "export": "hf"}
        self.fields = {**fields, "model": model(fields["model"])}
        self.small_run, self.top = small_run, top
        self.num_runs = 0
        undisturbed = top / "undisturbed"
        self.expected = self.result(train(settings(**self.options(undisturbed)))["model_sha256"], undisturbed)

    def options(self, output: Path) -> dict[str, Any]:
        return self.small_run(output=output, crew={"threads": 1, "max_failures": 20}, **self.fields)

    def start(self, output: Path, program: Sequence[str] = ()) -> Command:
        return Command(self.top / f"{output.name}.log", *flags(**self.options(output)), program=program)

    def fresh(self) -> Path:
        self.num_runs += 1
        return self.top / f"disturbed-{self.num_runs}"

    @staticmethod
    def result(model_sha256: str, output: Path) -> dict[str, Any]:
        return {"model": model_sha256, "checkpoint": digests(output), "losses": losses(output)}

    def check(self, output: Path) -> None:
        result = json.loads((output / "result.json").read_text())
        assert self.result(result["model_sha256"], output) == self.expected
        check_lost_work(output)
        assert len(training.list_steps(output / "checkpoints")) <= 2, "old ones are removed, also after a restart"


def check_lost_work(output: Path) -> None:
    """Every restart goes on from less than a save interval, and one save in the making, before the last step."""
    done = 0
    for line in lines(output / "metrics.jsonl"):
        if "loss" in line:
            assert line["step"] > done - 2 * SAVE_EVERY, f"step {line['step']} after step {done}"
            done = line["step"]


def kill_one(output: Path, command: Command, generation: int, draw: random.Random, inside: bool) -> bool:
    """Kill a worker of a generation at a random moment, or inside a save; return whether one was hit."""

    def started() -> dict[str, int] | None:
        found = [event["workers"] for event in events(output, "started") if event["generation"] == generation]
        return found[0] if found else None

    workers = command.wait(started)
    if inside:
        command.wait(lambda: any((output / "checkpoints").glob("*.partial-*")))
        POLL.wait(draw.uniform(0, 0.05))
    else:
        POLL.wait(draw.uniform(0, LATEST_S))
    if not workers or not command.runs:
        return False
    try:
        os.kill(draw.choice(list(workers.values())), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return command.wait(lambda: len(events(output, "restart")) > generation) is not None


def disturb(case: Case, num_kills: int, draw: random.Random, *, first_inside: bool = False) -> int:
    """Run once, kill up to `num_kills` times, check the result; return how many kills hit."""
    output = case.fresh()
    command = case.start(output)
    hits = 0
    while hits < num_kills and command.runs:
        inside = hits == 0 if first_inside else draw.random() < 0.3
        if not kill_one(output, command, hits, draw, inside):
            break
        hits += 1
    assert command.status() == 0, command.text()
    case.check(output)
    return hits


@pytest.mark.parametrize("name", ["sft tp2", "lora dp2"])
def test_two_kills_one_inside_a_save_change_no_bit(name: str, small_run: Any, model: Any, tmp_path: Path) -> None:
    case = Case(small_run, model, tmp_path, name)
    draw, hits = random.Random(name), 0
    while hits < 2:
        hits += disturb(case, 2 - hits, draw, first_inside=hits == 0)


def test_a_stopped_worker_is_found_and_the_run_goes_on_with_the_same_bits(
    small_run: Any, model: Any, tmp_path: Path
) -> None:
    options = {"model": model("small"), "tp": 2, "steps": 40, "save_every": 5, "export": "hf"}
    expected = train(settings(**small_run(output=tmp_path / "undisturbed", **options)))
    crew = {"threads": 1, "hang_extra_s": 1.5}
    command = Command(tmp_path / "log", *flags(**small_run(output=tmp_path / "run", crew=crew, **options)))
    command.wait(lambda: len(lines(tmp_path / "run" / "metrics.jsonl")) >= 6)
    os.kill(events(tmp_path / "run", "started")[0]["workers"]["1"], signal.SIGSTOP)
    assert command.status() == 0, command.text()
    (hang,) = events(tmp_path / "run", "hang")
    assert hang["rank"] == 1
    assert hang["silence_s"] < 10
    assert hang["stacks"]["1"]["state"].startswith("T")
    assert "all_reduce" in hang["stacks"]["0"]["stack"], "the other rank waits for it, and says where"
    assert "where it was stuck" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["model_sha256"] == expected["model_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LAYOUTS)
def test_50_kills_at_random_moments_change_no_bit(name: str, small_run: Any, model: Any, tmp_path: Path) -> None:
    """9 kills for each of 6 layouts: 54."""
    case = Case(small_run, model, tmp_path, name)
    draw, hits = random.Random(f"{name} 50"), 0
    while hits < 9:
        hits += disturb(case, min(5, 9 - hits), draw)


def test_a_killed_command_goes_on_when_it_is_run_again_at_once(small_run: Any, model: Any, tmp_path: Path) -> None:
    """Its crew may still be saving: the second command waits for it."""
    case = Case(small_run, model, tmp_path, "sft alone")
    output = case.fresh()
    command = case.start(output)
    assert command.wait(lambda: len(lines(output / "metrics.jsonl")) >= 7), command.text()
    command.process.kill()
    command.status()
    again = case.start(output)
    assert again.status() == 0, again.text()
    assert events(output, "resumed")[-1]["step"] >= SAVE_EVERY
    case.check(output)


def test_two_commands_do_not_train_in_one_directory(small_run: Any, model: Any, tmp_path: Path) -> None:
    case = Case(small_run, model, tmp_path, "sft alone")
    output = case.fresh()
    command = case.start(output)
    assert command.wait(lambda: events(output, "started")), command.text()
    command.process.send_signal(signal.SIGSTOP)  # it holds its lock, and does not end meanwhile
    for words in ([], ["--overwrite"]):
        other = Command(tmp_path / "other.log", *flags(**case.options(output)), *words)
        assert other.status() == 6, other.text()
        assert f"another process is training in {output}" in other.text()
        assert "[output.busy]" in other.text()
    command.process.send_signal(signal.SIGCONT)
    assert command.status() == 0, command.text()
    case.check(output)


def test_sigterm_saves_and_leaves_and_the_same_command_finishes(small_run: Any, model: Any, tmp_path: Path) -> None:
    case = Case(small_run, model, tmp_path, "sft pp2 tied")
    output = case.fresh()
    command = case.start(output, REAL)
    assert command.wait(lambda: len(lines(output / "metrics.jsonl")) >= 4), command.text()
    command.process.terminate()
    assert command.status() == 143, command.text()
    done = len(lines(output / "metrics.jsonl"))
    assert done < STEPS
    assert int(digests(output)["step"]) == done, "not one step is lost"
    assert not (output / "model").exists()
    again = case.start(output)
    assert again.status() == 0, again.text()
    assert events(output, "resumed")[-1]["step"] == done
    case.check(output)
