"""One training run as a page shows it: its numbers, what happened to it, how it was set, what it learnt from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.errors import InputError
from ferry.core.metrics import (
    METRICS_FILE,
    StepMetrics,
    ValidationPoint,
    read_json_lines,
    read_metrics,
    read_validation,
)

MARKED = ("saved", "restart", "rejected", "hang", "stopped", "failed")
"""The events that belong to a place on the curve."""

Samples = Sequence[Sequence[tuple[str, bool]]]
"""Rendered training samples: each a row of texts, and whether the loss is taken on them."""


@dataclass(frozen=True)
class RunCurves:
    """One run of `ferry train`."""

    name: str
    metrics: Sequence[StepMetrics]
    validation: Sequence[ValidationPoint] = ()
    events: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    samples: Samples = ()


class Mark(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: str
    text: str
    detail: str = ""
    """Where a rank was stuck: its stacks, as many lines as they are."""


def is_run(directory: Path) -> bool:
    """Say whether a directory is one that `ferry train` made."""
    return (directory / METRICS_FILE).is_file()


def read_run(directory: Path, name: str = "") -> RunCurves:
    """Read the directory of a run, also while it goes on. What it has not written yet is empty."""
    if not is_run(directory):
        raise InputError(
            f"{directory} has no {METRICS_FILE}: it is not the output of a training run",
            code="metrics.no-run",
            repair="give the directory that `ferry train --output` made",
        )
    path = directory / METRICS_FILE
    described = _document(directory / "run.json")
    events = directory / "events.jsonl"
    return RunCurves(
        name=name or directory.resolve().name,
        metrics=read_metrics(path),
        validation=read_validation(path),
        events=[values for _, values in read_json_lines(events)] if events.is_file() else [],
        config=described.get("config", {}),
        samples=[[(str(text), bool(is_supervised)) for text, is_supervised in s] for s in described.get("samples", ())],
    )


def marks_of(run: RunCurves) -> list[Mark]:
    """Return what happened, each thing at its step; one that names no step stands where the run was at that time."""
    marks = [
        Mark(_step(event, run.metrics), str(event["event"]), _text(event), _stack(event))
        for event in run.events
        if event.get("event") in MARKED
    ]
    if not any(mark.kind == "restart" for mark in marks):
        lives = zip(run.metrics, run.metrics[1:], strict=False)
        marks += [Mark(after.step, "restart", "") for before, after in lives if after.generation > before.generation]
    return sorted(marks)


def _step(event: Mapping[str, Any], metrics: Sequence[StepMetrics]) -> int:
    if isinstance(event.get("step"), int):
        return int(event["step"])
    return max((m.step for m in metrics if m.ts <= event.get("ts", 0.0)), default=0)


def _text(event: Mapping[str, Any]) -> str:
    told = (event.get(key) for key in ("reason", "cause", "message"))
    if event.get("event") == "hang":
        return f"rank {event.get('rank')} was silent for {event.get('silence_s')} s ({event.get('phase')})"
    return next((text for text in told if isinstance(text, str)), "")


def _stack(event: Mapping[str, Any]) -> str:
    """Return the stacks of the rank that hung, or what the system said of it where it could write none."""
    finding = (event.get("stacks") or {}).get(str(event.get("rank")))
    if not isinstance(finding, Mapping):
        return ""
    return str(finding.get("stack") or f"no stack: {finding.get('state')}, waits in {finding.get('waits_in')}")


def _document(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", code="metrics.damaged", repair="remove or restore it")
    return value
