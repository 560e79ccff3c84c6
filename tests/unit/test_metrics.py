"""The metrics file: what was measured comes back, whatever happened to the process that wrote it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.core.errors import InputError, OutputError
from ferry.core.metrics import (
    MetricsTail,
    MetricsWriter,
    StepMetrics,
    ValidationPoint,
    lm_loss_line,
    median,
    read_metrics,
    read_validation,
    smooth,
    summary,
)

STEP = StepMetrics(
    step=1, loss=2.5, lr=1e-5, grad_norm=1.25, num_tokens=900, num_supervised=400, num_padding=100, num_samples=8,
    step_s=2.0, cpu_s=3.6, tokens_per_s=450.0, tokens_per_s_per_device=2048.0, mfu=None, peak_memory_bytes=10**9,
    epoch=0.1, ts=1764000000.0,
)  # fmt: skip


def step(number: int, loss: float = 2.5, generation: int = 0) -> StepMetrics:
    return replace(STEP, step=number, loss=loss, generation=generation)


def written(path: Path, *lines: StepMetrics | ValidationPoint) -> Path:
    with MetricsWriter(path) as writer:
        for line in lines:
            writer.append(line)
    return path


@given(loss=st.floats(allow_nan=False, allow_infinity=False), lr=st.floats(0, 1), mfu=st.none() | st.floats(0, 1))
def test_every_bit_of_a_number_comes_back(
    tmp_path_factory: pytest.TempPathFactory, loss: float, lr: float, mfu: float | None
) -> None:
    line = replace(STEP, loss=loss, lr=lr, mfu=mfu)
    assert read_metrics(written(tmp_path_factory.mktemp("metrics") / "metrics.jsonl", line)) == [line]


def test_what_is_not_a_number_is_null_in_the_file_and_not_a_number_again(tmp_path: Path) -> None:
    path = written(tmp_path / "m", replace(STEP, loss=math.nan, grad_norm=math.inf))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (line,) = read_metrics(path)
    assert math.isnan(line.loss)
    assert math.isnan(line.grad_norm)


def test_after_a_restart_the_later_lines_count_and_what_lay_ahead_is_forgotten(tmp_path: Path) -> None:
    before = [step(number, loss=1.0) for number in range(1, 6)]
    point = ValidationPoint(5, 1.5, 100, 0.0)
    after = [step(3, loss=9.0, generation=1), step(4, loss=9.0, generation=1)]
    path = written(tmp_path / "m", *before, point, *after)
    assert [(line.step, line.loss) for line in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]
    assert read_validation(path) == []


def test_validation_points_are_read_apart_from_steps(tmp_path: Path) -> None:
    points = [ValidationPoint(0, 3.0, 100, 1.0), ValidationPoint(2, 2.0, 100, 2.0)]
    path = written(tmp_path / "m", points[0], step(1), step(2), points[1])
    assert read_validation(path) == points
    assert len(read_metrics(path)) == 2


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "m", step(1), step(2))
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [line.step for line in read_metrics(path)] == [1]


def test_a_new_writer_cuts_off_a_torn_line_so_that_the_file_stays_readable(tmp_path: Path) -> None:
    path = written(tmp_path / "m", step(1), step(2))
    path.write_bytes(path.read_bytes()[:-30])
    written(path, step(2, loss=7.0))
    assert [(line.step, line.loss) for line in read_metrics(path)] == [(1, 2.5), (2, 7.0)]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"step": 1, "lo')
    assert read_metrics(written(path, step(1))) == [step(1)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{ not json", "is not a JSON object"),
        ("[1, 2]", "is not a JSON object"),
        ('{"step": 2}', "has no loss"),
        (json.dumps({**STEP.__dict__, "step": "two"}), "has step='two', expected a number"),
        (json.dumps({**STEP.__dict__, "num_tokens": None}), "has num_tokens=None"),
        (json.dumps({**STEP.__dict__, "loss": True}), "has loss=True"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = written(tmp_path / "m", step(1))
    path.write_text(f"{path.read_text()}{line}\n{path.read_text()}")
    with pytest.raises(InputError, match=rf"line 2 {re.escape(told)}") as caught:
        read_metrics(path)
    assert caught.value.code == "metrics.damaged"


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text(json.dumps({**STEP.__dict__, "temperature": 3}) + "\n")
    assert read_metrics(path) == [STEP]


def test_a_tail_gives_each_line_once_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = MetricsTail(path)
    assert tail.new() == []
    written(path, step(1), step(2))
    assert tail.new() == [step(1), step(2)]
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert tail.new() == []
    point = ValidationPoint(3, 1.5, 100, 0.0)
    written(path, step(3), point)
    assert tail.new() == [step(3), point]
    assert tail.new() == []


def test_a_tail_names_the_damaged_line_and_begins_again_with_a_new_run(tmp_path: Path) -> None:
    path = written(tmp_path / "m", step(1), step(2))
    tail = MetricsTail(path)
    tail.new()
    path.unlink()
    written(path, step(1))
    assert tail.new() == [step(1)]
    with open(path, "ab") as file:
        file.write(b"damaged\n")
    with pytest.raises(InputError, match="line 2 is not a JSON object"):
        tail.new()


def test_a_missing_file_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_metrics(tmp_path / "nothing")


def test_a_full_disk_is_named_with_the_step() -> None:
    writer = MetricsWriter(Path("/dev/full"))
    with pytest.raises(OutputError, match="step 1 to /dev/full") as caught:
        writer.append(STEP)
    assert caught.value.code == "output.disk-full"


def test_the_readers_of_megatron_logs_read_the_loss_line() -> None:
    line = lm_loss_line(replace(STEP, step=7, loss=2.3456789), total_steps=100, global_batch=8, tflops_per_device=31.25)
    patterns = {
        r"iteration\s+(\d+)/\s*\d+": "7",
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration\s*\d*/\s*(\d+)": "100",
        r"consumed samples:\s+(\d+) \|": "56",
        r"elapsed time per iteration \(ms\): ([\d.]+)": "2000.0",
        r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)": "31.2",
        r"learning rate: ([\d.]+E[+-]\d+) \|": "1.000000E-05",
        r"global batch size:\s+(\d+) \|": "8",
        r"lm loss: ([\d.]+E[+-]\d+)": "2.345679E+00",
        r"loss scale: ([\d.]+) \|": "1.0",
        r"grad norm: ([\d.]+) \|": "1.250",
        r"number of skipped iterations:\s+(\d+) \|": "0",
        r"number of nan iterations:\s+(\d+) \|$": "0",
    }
    found = {pattern: match.group(1) for pattern in patterns if (match := re.search(pattern, line))}
    assert found == patterns


def test_the_loss_line_counts_a_loss_that_is_not_a_number() -> None:
    assert lm_loss_line(replace(STEP, loss=math.nan), 100, 8).endswith("number of nan iterations:   1 |")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 0.99))
def test_smoothing_stays_between_the_extremes_and_leaves_a_constant_alone(values: list[float], weight: float) -> None:
    smoothed = smooth(values, weight)
    room = 1e-6 * max(1.0, *(abs(value) for value in values))
    assert all(min(values) - room <= value <= max(values) + room for value in smoothed)
    assert smooth([3.0] * 5, weight) == pytest.approx([3.0] * 5)
    assert smoothed[0] == pytest.approx(values[0])


def test_smoothing_steps_over_what_is_not_a_number() -> None:
    smoothed = smooth([math.nan, 2.0, math.nan, 4.0], 0.5)
    assert math.isnan(smoothed[0])
    assert smoothed[1:] == pytest.approx([2.0, 2.0, (0.5 * 0.5 * 2.0 + 0.5 * 4.0) / 0.75])


def test_the_summary_says_what_a_run_was() -> None:
    lines = [step(1, 3.0), step(2, 1.0), step(3, math.nan, generation=2)]
    s = summary([*lines[:2], replace(lines[2], step_s=90.0)])
    assert (s.num_steps, s.first_loss, s.best_loss, s.best_step, s.num_restarts) == (3, 3.0, 1.0, 2, 2)
    assert (s.median_step_s, s.train_s, s.num_tokens, s.median_mfu) == (2.0, 94.0, 2700, None)
    assert s.padding_share == pytest.approx(0.1)
    assert s.cpu_ms_per_token == pytest.approx(4.0)


def test_the_median_of_an_even_number_of_values_lies_between() -> None:
    assert median([4.0, 1.0, math.nan, 3.0, 2.0]) == 2.5
    assert math.isnan(median([]))
