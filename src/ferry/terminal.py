"""What a person at a terminal sees: one line of progress, a plan, an error. Calm, and silent where no one is watching.

Progress goes to stderr. On a terminal it is one line, drawn at most ten times a second and gone at the end; in a log it
is a line every ten seconds; with `--quiet` or `--json` it is nothing. Colour only on a terminal, never with NO_COLOR.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import IO, Any

from ferry.core.plan import Plan
from ferry.core.progress import Reporter
from ferry.core.record import Record
from ferry.core.units import duration_text, size_text

DRAW_INTERVAL_S = 0.1
LOG_INTERVAL_S = 10.0
SHAPES = ((24, 16), (12, 16), (12, 8), (0, 8), (0, 0))
"""Widths of the bar and of the curve, from the widest line to the narrowest."""
BLOCKS = "▁▂▃▄▅▆▇█"
NUM_FILES_SHOWN = 40


class _Work:
    """One piece of work in progress."""

    def __init__(self, label: str, total: int, unit: str, done: int, now_s: float) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = done
        self.done_before = done
        self.started_s = now_s
        self.status = ""
        self.curve: Sequence[float] = ()


class TerminalReporter(Reporter):
    """Writes events to the run record and progress to a stream. May be called from several threads."""

    def __init__(
        self,
        stream: IO[str],
        record: Record | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._record = record
        self._quiet = quiet
        self._clock = clock
        self._is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._works: list[_Work] = []
        self._drawn_s = clock()
        self._line_is_drawn = False

    @property
    def is_watched(self) -> bool:
        return not self._quiet

    def event(self, name: str, /, **fields: Any) -> None:
        if self._record is not None:
            self._record.event(name, **fields)

    def start(self, label: str, total: int, unit: str = "bytes", done: int = 0) -> None:
        with self._lock:
            self._works.append(_Work(label, total, unit, done, self._clock()))
        self.event("started", label=label, **{f"total_{unit}": total}, **({"done": done} if done else {}))

    def advance(self, amount: int) -> None:
        with self._lock:
            if self._works:
                self._works[-1].done += amount
                self._show()

    def status(self, text: str, curve: Sequence[float] = ()) -> None:
        with self._lock:
            if self._works:
                self._works[-1].status = text
                self._works[-1].curve = tuple(curve)
                self._show()

    def finish(self) -> None:
        with self._lock:
            assert self._works, "finish() without start()"
            work = self._works.pop()
            self.clear()
        seconds = round(self._clock() - work.started_s, 3)
        self.event("finished", label=work.label, **{f"num_{work.unit}": work.done}, seconds=seconds)

    def say(self, text: str) -> None:
        with self._lock:
            self.clear()
            if not self._quiet:
                self._stream.write(f"{text}\n")
                self._stream.flush()

    def clear(self) -> None:
        """Remove the drawn line, so that other output starts on a clean one."""
        with self._lock:
            if self._line_is_drawn:
                self._stream.write("\r\x1b[K")
                self._stream.flush()
                self._line_is_drawn = False

    def _show(self) -> None:
        now_s = self._clock()
        interval_s = DRAW_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S
        if self._quiet or now_s - self._drawn_s < interval_s:
            return
        self._drawn_s = now_s
        work = self._works[-1]
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            lines = [_progress(work, now_s, *shape) for shape in SHAPES]
            line = next((line for line in lines if len(line) <= width), lines[-1][:width])
            self._stream.write(f"\r{line}\x1b[K")
            self._line_is_drawn = True
        else:
            self._stream.write(f"{_progress(work, now_s, 0, 0)}\n")
        self._stream.flush()


def _progress(work: _Work, now_s: float, bar_width: int, curve_width: int) -> str:
    rate = (work.done - work.done_before) / max(now_s - work.started_s, 1e-9)
    parts = [work.label]
    if work.total > 0:
        share = min(work.done / work.total, 1.0)
        filled = round(share * bar_width)
        parts += ["━" * filled + "┄" * (bar_width - filled), f"{share:4.0%}"]
    parts += _amounts(work, rate)
    if work.total > 0:
        left_s = max(work.total - work.done, 0) / rate if rate > 0 else 0.0
        parts.append(f"{duration_text(left_s)} left" if rate > 0 or work.done >= work.total else "")
    parts += [work.status, sparkline(work.curve, curve_width)]
    return "  ".join(part for part in parts if part)


def _amounts(work: _Work, rate: float) -> Iterator[str]:
    """Give how much is done, and the rate if it is known."""
    if work.unit == "bytes":
        total = f" of {size_text(work.total)}" if work.total > 0 else ""
        yield f"{size_text(work.done)}{total}"
        yield f"{size_text(rate)}/s"
    else:
        total = f" of {work.total:,}" if work.total > 0 else ""
        yield f"{work.done:,}{total} {work.unit}"
        if rate > 0:
            yield f"{rate:,.0f} {work.unit}/s" if rate >= 100 else f"{rate:.2g} {work.unit}/s"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return numbers as a row of blocks, the newest on the right: means of equal stretches, lowest to highest."""
    if not values or width <= 0:
        return ""
    width = min(width, len(values))
    cuts = [index * len(values) // width for index in range(width + 1)]
    stretches = [[v for v in values[start:end] if math.isfinite(v)] for start, end in pairwise(cuts)]
    means = [sum(stretch) / len(stretch) if stretch else math.nan for stretch in stretches]
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    heights = [round((mean - low) / span * (len(BLOCKS) - 1)) if span and mean == mean else 0 for mean in means]
    return "".join(BLOCKS[height] if mean == mean else " " for height, mean in zip(heights, means, strict=True))


def is_coloured(stream: IO[str]) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def error_text(message: str, repair: str, code: str, stream: IO[str]) -> str:
    """Return `error: message; repair [code]`; after a message that is a list, on a line of its own."""
    word = "\x1b[31merror:\x1b[0m" if is_coloured(stream) else "error:"
    joint = "\n" if "\n" in message else "; "
    return f"{word} {message}{joint + repair if repair else ''} [{code}]\n"


def plan_text(plan: Plan) -> str:
    """Return the page that `--dry-run` prints."""
    lines = [f"{plan.verb}: {plan.summary}", ""]
    for label, source in plan.inputs.items():
        lines.append(f"  {label:8}  {source}")
    if plan.output:
        lines.append(f"  output    {plan.output}")
    lines.append(f"  reads     {size_text(plan.read_bytes)}")
    lines.append(f"  writes    {size_text(plan.write_bytes)} in {len(plan.files)} files")
    if plan.memory_bytes:
        lines.append(f"  memory    {size_text(plan.memory_bytes)}")
    if plan.choices:
        lines += ["", "  chosen", *(f"    {choice}" for choice in plan.choices)]
    if plan.files:
        shown = plan.files[:NUM_FILES_SHOWN]
        lines += ["", "  files", *(f"    {size_text(file.num_bytes):>9}  {file.path}" for file in shown)]
        if len(plan.files) > len(shown):
            lines.append(f"    and {len(plan.files) - len(shown)} more (all of them with --json)")
    return "\n".join([*lines, "", "nothing was written (--dry-run)"]) + "\n"
