"""The line of progress: what a person sees while a long piece of work goes on, on a terminal and in a log."""

from __future__ import annotations

import io
import threading

import pytest

from ferry.terminal import TerminalReporter, sparkline


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")


def last_line(stream: io.StringIO) -> str:
    return stream.getvalue().rpartition("\r")[2].removesuffix("\x1b[K")


def training(stream: io.StringIO, clock: Clock, done: int = 0) -> TerminalReporter:
    reporter = TerminalReporter(stream, clock=clock)
    reporter.start("training", 100, unit="steps", done=done)
    return reporter


def test_training_is_one_calm_line() -> None:
    stream, clock = Terminal(), Clock()
    reporter = training(stream, clock)
    clock.now_s += 20
    reporter.advance(10)
    clock.now_s += 0.2
    reporter.status("loss 1.234  lr 2.0e-05  512 tok/s", [3.0, 2.0, 1.0])
    line = last_line(stream)
    assert line.startswith("training  ━━┄┄")
    assert "10 of 100 steps  0.5 steps/s  3 min 01 s left  loss 1.234  lr 2.0e-05  512 tok/s  █▅▁" in line
    assert "\n" not in stream.getvalue()


def test_the_line_is_drawn_at_most_ten_times_a_second() -> None:
    stream, clock = Terminal(), Clock()
    reporter = training(stream, clock)
    for _ in range(100):
        clock.now_s += 0.01
        reporter.advance(1)
    assert 9 <= stream.getvalue().count("\r") <= 10


@pytest.mark.parametrize("columns", [20, 60, 90, 120])
def test_a_narrow_terminal_gets_a_shorter_line(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream, clock = Terminal(), Clock()
    reporter = training(stream, clock)
    reporter.status("loss 1.234", [1.0, 2.0])
    clock.now_s += 1
    reporter.advance(1)
    assert 0 < len(last_line(stream)) < columns


def test_a_log_gets_a_line_every_ten_seconds_without_bar_and_curve() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = training(stream, clock)
    for number in range(50):
        clock.now_s += 1
        reporter.advance(1)
        reporter.status(f"loss {number}", [1.0, 2.0])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[1] == "training   20%  20 of 100 steps  1 steps/s  1 min 20 s left  loss 18"


def test_what_was_done_before_a_resume_is_no_part_of_the_rate() -> None:
    stream, clock = Terminal(), Clock()
    reporter = training(stream, clock, done=90)
    clock.now_s += 10
    reporter.advance(5)
    assert "95 of 100 steps  0.5 steps/s  10 s left" in last_line(stream)


def test_bytes_are_shown_as_sizes() -> None:
    stream, clock = Terminal(), Clock()
    reporter = TerminalReporter(stream, clock=clock)
    reporter.start("carrying", 100_000_000)
    clock.now_s += 1
    reporter.advance(25_000_000)
    assert "25%  25 MB of 100 MB  25 MB/s  3 s left" in last_line(stream)


def test_a_status_belongs_to_its_work_and_goes_with_it() -> None:
    stream, clock = Terminal(), Clock()
    reporter = TerminalReporter(stream, clock=clock)
    reporter.status("nothing goes on")
    reporter.start("training", 10, unit="steps")
    reporter.status("loss 1")
    reporter.start("saving", 1000)
    clock.now_s += 1
    reporter.advance(500)
    assert "loss" not in last_line(stream)
    reporter.finish()
    clock.now_s += 1
    reporter.advance(1)
    assert last_line(stream).endswith("loss 1")


def test_a_quiet_reporter_writes_nothing() -> None:
    stream, clock = Terminal(), Clock()
    reporter = TerminalReporter(stream, quiet=True, clock=clock)
    reporter.start("training", 10, unit="steps")
    clock.now_s += 60
    reporter.advance(1)
    reporter.status("loss 1")
    reporter.finish()
    assert stream.getvalue() == ""


def test_steps_of_many_threads_are_all_counted() -> None:
    stream, clock = Terminal(), Clock()
    reporter = TerminalReporter(stream, clock=clock)
    reporter.start("tokenising", 8000, unit="rows")
    threads = [threading.Thread(target=lambda: [reporter.advance(1) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now_s += 1
    reporter.advance(0)
    assert "8,000 of 8,000 rows  8,000 rows/s" in last_line(stream)


@pytest.mark.parametrize(
    ("values", "width", "shown"),
    [
        ([], 8, ""),
        ([1.0, 2.0], 0, ""),
        ([1.0, 1.0, 1.0], 8, "▁▁▁"),
        ([0.0, 7.0], 8, "▁█"),
        ([float("nan"), 1.0, 2.0], 8, " ▁█"),
        ([float("nan")], 8, ""),
        ([0.0, 0.0, 4.0, 4.0, 8.0, 8.0], 3, "▁▅█"),
    ],
)
def test_a_sparkline_shows_means_of_stretches(values: list[float], width: int, shown: str) -> None:
    assert sparkline(values, width) == shown
