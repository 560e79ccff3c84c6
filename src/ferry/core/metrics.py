"""What a training run measured: one JSON object a line, appended by rank 0 while it trains.

A line is written by one call, so readers see it whole or not at all. A run that was killed and resumed measures some
steps again: the later line counts, and what an earlier life wrote beyond the step it was resumed from never happened.
Numbers keep every bit; NaN and the infinities are written as null, because JSON has no word for them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ferry.core.errors import InputError, OutputError

METRICS_FILE = "metrics.jsonl"
MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class StepMetrics:
    """One step. Token counts and times are of all devices together."""

    step: int
    """From 1."""
    loss: float
    lr: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Real tokens: padding is not counted."""
    num_supervised: int
    num_padding: int
    num_samples: int
    step_s: float
    cpu_s: float
    """CPU seconds of all ranks."""
    tokens_per_s: float
    """Real tokens."""
    tokens_per_s_per_device: float
    """Global batch size x sequence length / (devices x step time): counts padding, as the usual logs do."""
    mfu: float | None
    peak_memory_bytes: int
    """The most of any rank."""
    epoch: float
    ts: float
    """Unix time at the end of the step."""
    generation: int = 0
    """How often the run had been restarted."""


@dataclass(frozen=True)
class ValidationPoint:
    """The loss on held-out data after a step."""

    step: int
    validation_loss: float
    validation_tokens: int
    ts: float


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers. Medians are over steps: one slow step does not change them."""

    num_steps: int
    first_loss: float
    last_loss: float
    best_loss: float
    best_step: int
    median_step_s: float
    median_tokens_per_s: float
    median_tokens_per_s_per_device: float
    median_mfu: float | None
    num_tokens: int
    num_supervised: int
    padding_share: float
    cpu_ms_per_token: float
    peak_memory_bytes: int
    train_s: float
    """The steps' own time: loading, saving and validating are not in it."""
    num_restarts: int


class MetricsWriter:
    """Appends lines to a metrics file. A line that a killed run left half-written is cut off first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            _cut_torn_line(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, line: StepMetrics | ValidationPoint) -> None:
        """Append one line. It survives a kill of this process at once."""
        data = _encoded(asdict(line))
        try:
            written = os.write(self._fd, data)
            while written < len(data):  # the disk is nearly full: the next call says so
                written += os.write(self._fd, data[written:])
        except OSError as error:
            code = "output.disk-full" if error.errno in (28, 122) else "output.unwritable"
            raise OutputError(
                f"cannot write step {line.step} to {self.path}: {error.strerror}",
                code=code,
                repair="free some space, then resume",
            ) from None

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsTail:
    """Reads a metrics file while it grows: every look costs what is new, however long the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_bytes = 0
        self._num_lines = 0

    def new(self) -> list[StepMetrics | ValidationPoint]:
        """Return the lines that became whole since the last look, as written: a resumed run repeats steps."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._num_bytes:  # the run was begun anew
                self._num_bytes = self._num_lines = 0
            file.seek(self._num_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        objects = _objects(self.path, whole, self._num_lines + 1)
        self._num_bytes += len(whole) + len(newline)
        self._num_lines += whole.count(b"\n") + len(newline)
        return [_line(values, self.path, number) for number, values in objects]


def read_metrics(path: Path) -> list[StepMetrics]:
    """Return the steps of a metrics file in order, each once."""
    return _read(path)[0]


def read_validation(path: Path) -> list[ValidationPoint]:
    """Return the validation points of a metrics file in order, each once."""
    return _read(path)[1]


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a file with one JSON object a line, each with its line number.

    A last line without newline was being written when its process ended: it is left out.
    """
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", code="metrics.unreadable") from None
    return _objects(path, whole, 1)


def summary(metrics: Sequence[StepMetrics]) -> Summary:
    """Return a run in a few numbers. There must be at least one step."""
    assert metrics, "a summary needs at least one step"
    finite = [m for m in metrics if math.isfinite(m.loss)] or list(metrics[-1:])
    best = min(finite, key=lambda m: m.loss)
    num_tokens = sum(m.num_tokens for m in metrics)
    num_padding = sum(m.num_padding for m in metrics)
    mfus = [m.mfu for m in metrics if m.mfu is not None]
    return Summary(
        num_steps=len(metrics),
        first_loss=metrics[0].loss,
        last_loss=metrics[-1].loss,
        best_loss=best.loss,
        best_step=best.step,
        median_step_s=median([m.step_s for m in metrics]),
        median_tokens_per_s=median([m.tokens_per_s for m in metrics]),
        median_tokens_per_s_per_device=median([m.tokens_per_s_per_device for m in metrics]),
        median_mfu=median(mfus) if mfus else None,
        num_tokens=num_tokens,
        num_supervised=sum(m.num_supervised for m in metrics),
        padding_share=num_padding / max(num_tokens + num_padding, 1),
        cpu_ms_per_token=1000 * sum(m.cpu_s for m in metrics) / max(num_tokens, 1),
        peak_memory_bytes=max(m.peak_memory_bytes for m in metrics),
        train_s=sum(m.step_s for m in metrics),
        num_restarts=max(m.generation for m in metrics),
    )


def median(values: Iterable[float]) -> float:
    """Return the median of the values that are numbers, or NaN if none is."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def smooth(values: Iterable[float], weight: float) -> list[float]:
    """Return the exponential moving average, without the pull towards zero at the start.

    `weight` is the share of the past, from 0 (nothing changes) to below 1. What is not a number is stepped over.
    """
    assert 0 <= weight < 1, "weight must be at least 0 and below 1"
    mean, trust, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            trust = weight * trust + (1 - weight)
        smoothed.append(mean / trust if trust else math.nan)
    return smoothed


def lm_loss_line(m: StepMetrics, total_steps: int, global_batch: int, tflops_per_device: float | None = None) -> str:
    """Return a step as Megatron-LM logs it, so that the readers of its logs read this one too."""
    parts = [f" [{datetime.fromtimestamp(m.ts):%Y-%m-%d %H:%M:%S}] iteration {m.step:8d}/{total_steps:8d}"]
    parts.append(f"consumed samples: {m.step * global_batch:12d}")
    parts.append(f"elapsed time per iteration (ms): {1000 * m.step_s:.1f}")
    if tflops_per_device is not None:
        parts.append(f"throughput per GPU (TFLOP/s/GPU): {tflops_per_device:.1f}")
    parts.append(f"learning rate: {m.lr:.6E}")
    parts.append(f"global batch size: {global_batch:5d}")
    parts.append(f"lm loss: {m.loss:.6E}")
    parts.append("loss scale: 1.0")
    parts.append(f"grad norm: {m.grad_norm:.3f}")
    parts.append("number of skipped iterations:   0")
    parts.append(f"number of nan iterations: {0 if math.isfinite(m.loss) else 1:3d}")
    return " | ".join(parts) + " |"


def _objects(path: Path, whole: bytes, first_number: int) -> list[tuple[int, dict[str, Any]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(whole.split(b"\n"), start=first_number):
        if not line:
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise _damaged(path, number, "is not a JSON object")
        found.append((number, value))
    return found


def _read(path: Path) -> tuple[list[StepMetrics], list[ValidationPoint]]:
    steps: dict[int, StepMetrics] = {}
    points: dict[int, ValidationPoint] = {}
    for number, values in read_json_lines(path):
        line = _line(values, path, number)
        if isinstance(line, ValidationPoint):
            points[line.step] = line
            continue
        if steps and line.step <= next(reversed(steps)):  # the run was resumed: it forgets what lay ahead
            for forgotten in [step for step in steps if step >= line.step]:
                del steps[forgotten]
            for forgotten in [step for step in points if step >= line.step]:
                del points[forgotten]
        steps[line.step] = line
    return list(steps.values()), [points[step] for step in sorted(points)]


def _line(values: Mapping[str, Any], path: Path, number: int) -> StepMetrics | ValidationPoint:
    if "validation_loss" in values:
        return _decoded(ValidationPoint, values, path, number)
    return _decoded(StepMetrics, values, path, number)


T = TypeVar("T", StepMetrics, ValidationPoint)


def _decoded(kind: type[T], values: Mapping[str, Any], path: Path, number: int) -> T:
    """Return one line as its type. Keys that a later version may have added are left out."""
    known: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in values:
            if field.name in ("mfu", "generation"):
                continue
            raise _damaged(path, number, f"has no {field.name}")
        value, nullable = values[field.name], field.type == "float | None"
        if value is None and field.type == "float":
            value = math.nan
        is_number = isinstance(value, int if field.type == "int" else (int, float)) and not isinstance(value, bool)
        if not is_number and not (value is None and nullable):
            raise _damaged(path, number, f"has {field.name}={value!r}, expected a number")
        known[field.name] = value if value is None or field.type == "int" else float(value)
    return kind(**{"mfu": None, **known} if kind is StepMetrics else known)


def _encoded(values: Mapping[str, Any]) -> bytes:
    said = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return (json.dumps(said, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _cut_torn_line(fd: int, path: Path) -> None:
    size = os.fstat(fd).st_size
    start = max(size - MAX_LINE_BYTES, 0)
    end = os.pread(fd, size - start, start)
    if end.endswith(b"\n") or not end:
        return
    if b"\n" not in end and start:
        raise _damaged(path, 1, f"is longer than {MAX_LINE_BYTES} bytes")
    os.ftruncate(fd, start + end.rfind(b"\n") + 1)


def _damaged(path: Path, number: int, what: str) -> InputError:
    return InputError(
        f"{path}, line {number} {what}", code="metrics.damaged", repair="remove that line, or restore the file"
    )
