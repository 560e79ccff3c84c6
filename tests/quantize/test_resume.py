"""Which loss would this catch? A kill that costs more than a block, or changes one bit of the result.

Processes are killed for good, at moments drawn from a seed. The judge is a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import ferry
from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory
from ferry.verbs.quantize.journal import LINES, journal_of
from ferry.verbs.quantize.plan import bytes_to_go
from quantize.making import files_of, flags, forked, hidden_beside, quantized

FORK = get_context("fork")
MOMENT = threading.Event()
LIMIT_S = 300.0
WAYS: dict[str, dict[str, Any]] = {
    "smoothquant": {},
    "one strength": {"smooth_strength": 0.5, "max_shard_size": 1_000_000},
    "awq": {"method": "awq"},
    "static": {"per_token": False, "search": {"fallback_budget": 0.1}},
    "rtn": {"method": "rtn", "evaluate": False},
}


class Recorder(Reporter):
    """Keeps where each piece of work began."""

    def __init__(self) -> None:
        self.begun: dict[str, int] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []

    def start(self, label: str, total: int, unit: str = "bytes", done: int = 0) -> None:
        self.begun[label] = done

    def event(self, name: str, /, **fields: Any) -> None:
        self.events.append((name, fields))


class Case:
    """One run, what it must come to, and how long it takes."""

    def __init__(self, source: Path, text: Path, top: Path, name: str) -> None:
        self.options = {"model": source, "data": (str(text),), "samples": 16, **WAYS[name]}
        if WAYS[name].get("method") == "rtn":
            del self.options["data"]
        self.top, self.num_runs = top, 0
        quantized(output=top / "undisturbed", **self.options)
        self.expected = files_of(top / "undisturbed")

    def fresh(self) -> Path:
        self.num_runs += 1
        return self.top / f"disturbed-{self.num_runs}"

    def start(self, output: Path) -> BaseProcess:
        """Run in a process of its own, which has everything imported."""
        child = FORK.Process(target=_child, args=({**self.options, "output": output},))
        child.start()
        return child

    def check(self, output: Path, reporter: Reporter | None = None) -> None:
        """Finish, and compare."""
        if not output.exists():
            quantized(reporter, output=output, **self.options)
        assert files_of(output) == self.expected
        assert not hidden_beside(output)
        ferry.verify(path=output)


def _child(options: dict[str, Any]) -> None:
    quantized(**options)


def num_lines(output: Path, number: int) -> int:
    """Return how many blocks count in a pass."""
    alone = StagedDirectory(output).work  # of scales alone
    paths = [folder / f"pass-{number}" / LINES for folder in (journal_of(output), alone)]
    return max((path.read_bytes().count(b"\n") - 1 for path in paths if path.exists()), default=0)


def kill_at(child: BaseProcess, condition: Callable[[], bool], delay_s: float = 0.0) -> bool:
    """Kill a process a moment after a condition holds; return whether it still ran."""
    while child.is_alive() and not condition():
        MOMENT.wait(0.001)
    MOMENT.wait(delay_s)
    child.kill()
    child.join(LIMIT_S)
    return child.exitcode == -signal.SIGKILL


@pytest.fixture
def case(model: Callable[[str], Path], text: Path, tmp_path: Path) -> Callable[[str], Case]:
    return lambda name: Case(model("llama-long"), text, tmp_path, name)


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_run_goes_on_with_the_block_it_was_at(number: int, case: Callable[[str], Case]) -> None:
    case_ = case("smoothquant")
    output = case_.fresh()
    assert kill_at(case_.start(output), lambda: num_lines(output, number) >= 3)
    assert not output.exists(), "nothing half-made is visible"
    done = num_lines(output, number)
    assert 3 <= done < 8
    reporter = Recorder()
    case_.check(output, reporter)
    if number == 1:
        assert reporter.begun["calibrating"] == done
    else:
        assert reporter.begun["calibrating"] == 6, "pass 1 was whole"
        assert reporter.begun["quantizing"] == done - 1, "the first unit is no block"
        assert ("resumed", {"units": done}) in reporter.events


def disturb(case: Case, draw: random.Random, num_kills: int) -> int:
    """Kill one run so often at random moments, then let it finish; return how many kills hit."""
    output, hits = case.fresh(), 0
    for _ in range(num_kills):
        lines = sum(num_lines(output, number) for number in (1, 2))
        wanted = lines + draw.randrange(3)
        child = case.start(output)
        reached = lambda wanted=wanted: sum(num_lines(output, number) for number in (1, 2)) >= wanted  # noqa: E731
        hits += kill_at(child, reached, draw.uniform(0, 0.05))
        assert sum(num_lines(output, number) for number in (1, 2)) >= lines or output.exists(), "no block is lost"
        if output.exists():
            break
    case.check(output)
    return hits


@pytest.mark.parametrize("name", ["one strength", "static"])
def test_three_kills_at_random_moments_change_no_bit(name: str, case: Callable[[str], Case]) -> None:
    assert disturb(case(name), random.Random(name), 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WAYS)
def test_40_kills_at_random_moments_change_no_bit(name: str, case: Callable[[str], Case]) -> None:
    case_, draw, hits = case(name), random.Random(f"{name} 40"), 0
    while hits < 40:
        hits += disturb(case_, draw, 6)


def test_a_run_of_scales_alone_goes_on_too(model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    options = {"model": model("llama-long"), "data": (str(text),), "generate_scale": True}
    quantized(scale_output=tmp_path / "undisturbed", **options)
    output = tmp_path / "scales"
    child = FORK.Process(target=_child, args=({**options, "scale_output": output},))
    child.start()
    assert kill_at(child, lambda: num_lines(output, 1) >= 2)
    assert not output.exists()
    done, reporter = num_lines(output, 1), Recorder()
    quantized(reporter, scale_output=output, **options)
    assert reporter.begun["calibrating"] == done
    assert output.read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert not hidden_beside(output)


def test_a_run_that_had_written_its_scales_goes_on_without_overwrite(
    model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    scales, output = tmp_path / "scales", tmp_path / "out"
    options = {"model": model("llama-long"), "data": (str(text),), "scale_output": scales, "output": output}
    child = FORK.Process(target=_child, args=(options,))
    child.start()
    assert kill_at(child, lambda: num_lines(output, 2) >= 2)
    assert scales.exists()
    quantized(**options)
    assert output.exists()
    assert not hidden_beside(output)


# ---- what a journal may be found as


@pytest.fixture
def killed(case: Callable[[str], Case]) -> tuple[Case, Path]:
    """A run that was killed in its second pass."""
    case_ = case("one strength")
    output = case_.fresh()
    assert kill_at(case_.start(output), lambda: num_lines(output, 2) >= 4)
    return case_, output


def test_a_torn_last_line_does_not_count(killed: tuple[Case, Path]) -> None:
    case, output = killed
    path = journal_of(output) / "pass-2" / LINES
    done = num_lines(output, 2)
    with open(path, "ab") as file:
        file.write(b'{"line": {"entries": [["model.lay')
    reporter = Recorder()
    case.check(output, reporter)
    assert reporter.begun["quantizing"] == done - 1


def test_a_pass_whose_states_are_gone_begins_anew(killed: tuple[Case, Path]) -> None:
    case, output = killed
    states = list((journal_of(output) / "pass-2").glob("states-*"))
    assert states
    for path in states:
        path.unlink()
    reporter = Recorder()
    case.check(output, reporter)
    assert reporter.begun["quantizing"] == 0


@pytest.mark.parametrize("harm", ["removed", "cut", "directory removed"])
def test_a_pass_whose_weights_are_gone_begins_anew(harm: str, killed: tuple[Case, Path]) -> None:
    case, output = killed
    work = output.parent / f".{output.name}.ferry-partial"
    file = sorted(work.glob("*.safetensors"))[0]
    if harm == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        for path in sorted(work.iterdir()) if harm == "directory removed" else [file]:
            path.unlink()
    if harm == "directory removed":
        work.rmdir()
    reporter = Recorder()
    case.check(output, reporter)
    assert reporter.begun["quantizing"] == 0


def test_a_journal_full_of_zeros_is_as_good_as_none(killed: tuple[Case, Path]) -> None:
    case, output = killed
    path = journal_of(output) / "pass-2" / LINES
    path.write_bytes(bytes(path.stat().st_size) + b"\n")
    case.check(output)


def test_a_journal_of_other_options_is_thrown_away(killed: tuple[Case, Path]) -> None:
    case, output = killed
    other = {**case.options, "smooth_strength": 0.8}
    reporter = Recorder()
    quantized(reporter, output=output, **other)
    assert reporter.begun == {**reporter.begun, "calibrating": 0, "quantizing": 0}
    assert files_of(output) != case.expected
    quantized(output=output.parent / "other", **other)
    assert files_of(output) == files_of(output.parent / "other")


def test_a_journal_of_another_configuration_is_thrown_away(killed: tuple[Case, Path]) -> None:
    """The weight files are the same ones: they alone do not say what a model computes."""
    case, output = killed
    source = output.parent / "source"
    shutil.copytree(case.options["model"], source)
    for path in source.glob("*.safetensors"):
        os.utime(path, ns=((case.options["model"] / path.name).stat().st_mtime_ns,) * 2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    reporter = Recorder()
    quantized(reporter, output=output, **{**case.options, "model": source})
    assert reporter.begun["calibrating"] == 0


def test_a_disk_needs_room_for_what_is_left_to_do(killed: tuple[Case, Path]) -> None:
    _, output = killed
    assert bytes_to_go(output.parent / "another", 1 << 20) == 1 << 20
    assert 0 < bytes_to_go(output, 1 << 30) < 1 << 30
    assert bytes_to_go(output, 1) == 0


# ---- asked to stop


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_keeps_its_work_and_says_how_to_go_on(
    number: signal.Signals, model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    options = {"model": model("llama-long"), "data": (str(text),), "samples": 24, "output": tmp_path / "out"}
    process = forked(tmp_path / "log", *flags(**options))
    while process.poll() is None and not num_lines(tmp_path / "out", 1):
        MOMENT.wait(0.002)
    os.kill(process.pid, number)
    assert process.wait(LIMIT_S) == 128 + number
    said = (tmp_path / "log").read_text()
    assert "what is done is kept" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    done, reporter = num_lines(tmp_path / "out", 1), Recorder()
    assert done
    quantized(reporter, **options)
    assert reporter.begun["calibrating"] == done
    (record,) = Path(os.environ["FERRY_HOME"]).rglob("result.json")
    assert json.loads(record.read_text())["status"] == "interrupted"
