"""A few numbers in memory that the supervisor and its workers share: the progress of each worker, and the wish to stop.

The memory is anonymous and made before the first fork. Each worker writes its own row only. A reader may see a row in
the middle of a write; the time of the last progress is written first, so such a row never looks older than it is.
"""

from __future__ import annotations

import mmap
import time
from typing import Literal, NamedTuple, get_args

Phase = Literal["starting", "loading", "training", "validating", "saving", "exporting"]
PHASES: tuple[str, ...] = get_args(Phase)
_CELL_BYTES = 8
_STOP = 0
_FIRST_ROW = 1


class Beat(NamedTuple):
    """The latest sign of life of one worker."""

    progress_ns: int
    """`time.monotonic_ns()` of the last progress. The clock is the same in all processes of a machine."""
    step: int
    phase: int
    """A place in PHASES."""
    median_ns: int
    """The median duration of the last steps."""
    num_steps: int
    """How many durations are known."""


class Board:
    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        num_cells = _FIRST_ROW + num_workers * len(Beat._fields)
        self._cells = memoryview(mmap.mmap(-1, num_cells * _CELL_BYTES)).cast("q")
        self.clear()

    def clear(self) -> None:
        """Forget all progress; the clock of every worker starts now."""
        for row in range(self.num_workers):
            self.write(row, Beat(time.monotonic_ns(), 0, 0, 0, 0))

    def write(self, row: int, beat: Beat) -> None:
        first = _FIRST_ROW + row * len(beat)
        for place, value in enumerate(beat):
            self._cells[first + place] = value

    def read(self, row: int) -> Beat:
        first = _FIRST_ROW + row * len(Beat._fields)
        return Beat(*self._cells[first : first + len(Beat._fields)])

    def request_stop(self) -> None:
        self._cells[_STOP] = 1

    def stop_requested(self) -> bool:
        return self._cells[_STOP] == 1
