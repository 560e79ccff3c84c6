"""Training runs as `ferry runs` sees them: where their numbers lie, how two curves differ, the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ferry.core.errors import InputError, OutputError
from ferry.core.metrics import StepMetrics, Summary, summary
from ferry.core.runs import Run, find_run
from ferry.core.staging import write_file
from ferry.pages.curves import RunCurves, is_run, read_run


def find(wanted: str) -> Run:
    """Return a record by its id, or the directory of a training run as if it were a record."""
    directory = Path(wanted)
    if not is_run(directory):
        return find_run(wanted)
    config = {"config": dict(read_run(directory).config), "directory": str(directory.resolve())}
    return Run(id=wanted, path=directory, verb="train", status="", started_s=0.0, config=config, outcome={})


def training_directory(run: Run) -> Path | None:
    """Return the directory that a training run made, or None for any other run."""
    if is_run(run.path):
        return run.path
    told = (run.outcome.get("result", {}).get("output"), run.config.get("config", {}).get("output"))
    for output in told:
        directory = Path(run.config.get("directory", ""), output) if isinstance(output, str) and output else None
        if directory is not None and is_run(directory):
            return directory
    return None


def curves_of(runs: Sequence[Run]) -> list[RunCurves]:
    """Return the curves of those runs that have any, named by their directories, or by id if these are alike."""
    directories = [(run, directory) for run in runs if (directory := training_directory(run))]
    names = [directory.resolve().name for _, directory in directories]
    if len(set(names)) < len(names):
        names = [run.id for run, _ in directories]
    return [read_run(directory, name) for name, (_, directory) in zip(names, directories, strict=True)]


def compare_curves(first: RunCurves, second: RunCurves) -> dict[str, Any]:
    """Return the numbers of two curves side by side, and how far apart their losses ever are at the same step."""
    losses = {m.step: m.loss for m in first.metrics}
    distances = [(m.step, abs(m.loss - losses[m.step])) for m in second.metrics if m.step in losses]
    compared = [pair for pair in distances if math.isfinite(pair[1])]
    step, difference = max(compared, key=lambda pair: pair[1], default=(None, None))
    return {
        **_side_by_side(first.metrics, second.metrics),
        "num_common_steps": len(distances),
        "num_not_compared": len(distances) - len(compared),
        "max_loss_difference": difference,
        "max_loss_difference_step": step,
    }


def write_page(runs: Sequence[Run], page: Path) -> None:
    """Write the loss page of one run, or of two laid over each other."""
    from ferry.pages.loss import render_page

    without = [run.id for run in runs if training_directory(run) is None]
    if without:
        raise InputError(
            f"{' and '.join(without)}: no metrics of a training run are found, a page needs them",
            code="runs.no-curves",
            repair="give runs of `ferry train` whose output directories are still there",
        )
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise OutputError(
            f"cannot write {page}: it is a directory, or its directory does not exist",
            code="output.unwritable",
            repair="give the path of a file in a directory that exists",
        )
    curves = curves_of(runs)
    write_file(page.absolute(), render_page(curves, " and ".join(run.name for run in curves)).encode())


def _side_by_side(first: Sequence[StepMetrics], second: Sequence[StepMetrics]) -> dict[str, list[float | None]]:
    sides = [summary(metrics) if metrics else None for metrics in (first, second)]
    names = {
        "steps": "num_steps",
        "first_loss": "first_loss",
        "last_loss": "last_loss",
        "min_loss": "best_loss",
        "median_tokens_per_s": "median_tokens_per_s",
    }
    return {name: [_value(side, field) for side in sides] for name, field in names.items()}


def _value(side: Summary | None, field: str) -> float | None:
    value = None if side is None else getattr(side, field)
    return value if value is not None and math.isfinite(value) else None
