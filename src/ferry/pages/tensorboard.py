"""The metrics of a run as TensorBoard event files, for those who watch all their runs there.

Needs the package tensorboardX, which writes the files without TensorBoard itself. The names of the curves are the names
of the fields in metrics.jsonl. A resumed run tells TensorBoard from which step on it replaces what it wrote before.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from ferry.core.errors import UnavailableError
from ferry.core.metrics import StepMetrics, ValidationPoint

CURVES = ("loss", "lr", "grad_norm", "tokens_per_s", "tokens_per_s_per_device", "mfu", "peak_memory_bytes", "epoch")


class TensorBoardWriter:
    """Writes event files into a directory. Use as a context manager, or call `close()`."""

    def __init__(self, directory: Path, first_step: int = 1) -> None:
        """`first_step` is the first step that will be written: later ones of an earlier life are hidden."""
        self._writer: Any = _summary_writer()(str(directory), purge_step=first_step if first_step > 1 else None)

    def append(self, line: StepMetrics | ValidationPoint) -> None:
        """Write one line of metrics. What is not a number is left out."""
        values = asdict(line)
        names = CURVES if isinstance(line, StepMetrics) else ("validation_loss",)
        for name in names:
            if values[name] is not None and math.isfinite(values[name]):
                self._writer.add_scalar(f"train/{name}", values[name], line.step, walltime=line.ts)
        if isinstance(line, StepMetrics):
            share = line.num_padding / max(line.num_padding + line.num_tokens, 1)
            self._writer.add_scalar("train/padding_share", share, line.step, walltime=line.ts)

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_available() -> None:
    """Refuse now rather than after the first step, if the package is missing."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        return import_module("tensorboardX").SummaryWriter
    except ImportError:
        raise UnavailableError(
            "TensorBoard event files need the package tensorboardX, which is not installed",
            code="metrics.no-tensorboard",
            repair="pip install tensorboardX, or train without TensorBoard (metrics.jsonl holds the same numbers)",
        ) from None
