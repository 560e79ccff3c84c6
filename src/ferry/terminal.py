"""What a person at a terminal sees: one line of progress, a plan, an error. Calm, and silent where no one is watching.

Progress goes to stderr. On a terminal it is one line, drawn at most ten times a second and gone at the end; in a log it
is a line every ten seconds; with `--quiet` or `--json` it is nothing. Colour only on a terminal, never with NO_COLOR.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from typing import IO, Any

from ferry.core.plan import Plan
from ferry.core.progress import Reporter
from ferry.core.record import Record
from ferry.core.units import duration_text, size_text

DRAW_INTERVAL_S = 0.1
LOG_INTERVAL_S = 10.0
BAR_WIDTHS = (24, 12, 0)
NUM_FILES_SHOWN = 40


class _Work:
    """One piece of work in progress."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self.label = label
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return max(time.monotonic() - self.started_s, 1e-9)


class TerminalReporter(Reporter):
    """Writes events to the run record and progress to a stream. May be called from several threads."""

    def __init__(self, stream: IO[str], record: Record | None = None, *, quiet: bool = False) -> None:
        self._stream = stream
        self._record = record
        self._quiet = quiet
        self._is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._works: list[_Work] = []
        self._drawn_s = time.monotonic()
        self._line_is_drawn = False

    def event(self, name: str, /, **fields: Any) -> None:
        if self._record is not None:
            self._record.event(name, **fields)

    def start(self, label: str, total_bytes: int) -> None:
        with self._lock:
            self._works.append(_Work(label, total_bytes))
        self.event("started", label=label, total_bytes=total_bytes)

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            if self._works:
                self._works[-1].done_bytes += num_bytes
                self._show()

    def finish(self) -> None:
        with self._lock:
            assert self._works, "finish() without start()"
            work = self._works.pop()
            self.clear()
        self.event("finished", label=work.label, num_bytes=work.done_bytes, seconds=round(work.elapsed_s, 3))

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
        now_s = time.monotonic()
        interval_s = DRAW_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S
        if self._quiet or now_s - self._drawn_s < interval_s:
            return
        self._drawn_s = now_s
        work = self._works[-1]
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            lines = [_progress(work, bar_width) for bar_width in BAR_WIDTHS]
            line = next((line for line in lines if len(line) <= width), lines[-1][:width])
            self._stream.write(f"\r{line}\x1b[K")
            self._line_is_drawn = True
        else:
            self._stream.write(f"{_progress(work, 0)}\n")
        self._stream.flush()


def _progress(work: _Work, bar_width: int) -> str:
    rate = work.done_bytes / work.elapsed_s
    if work.total_bytes <= 0:
        return f"{work.label}  {size_text(work.done_bytes)}  {size_text(rate)}/s"
    share = min(work.done_bytes / work.total_bytes, 1.0)
    filled = round(share * bar_width)
    bar = f"{'━' * filled}{'┄' * (bar_width - filled)}  " if bar_width else ""
    left_s = max(work.total_bytes - work.done_bytes, 0) / rate if rate else 0.0
    amounts = f"{size_text(work.done_bytes)} of {size_text(work.total_bytes)}  {size_text(rate)}/s"
    return f"{work.label}  {bar}{share:4.0%}  {amounts}  {duration_text(left_s)} left"


def is_coloured(stream: IO[str]) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def error_text(message: str, repair: str, code: str, stream: IO[str]) -> str:
    """Return `error: message; repair [code]`."""
    word = "\x1b[31merror:\x1b[0m" if is_coloured(stream) else "error:"
    return f"{word} {message}{f'; {repair}' if repair else ''} [{code}]\n"


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
