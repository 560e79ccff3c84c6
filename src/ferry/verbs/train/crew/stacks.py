"""What hung workers were doing: the Python stacks they write on SIGUSR1, and what the kernel says about them.

A worker that is stopped, or waits inside the kernel, cannot write its stack. That is a finding too: its state says so.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_LIMIT_S = 1.0
_POLL_S = 0.02
_NUM_LINES_OF_A_THREAD = 25
_NUM_CHARACTERS = 6000


class Finding(NamedTuple):
    """One worker at the moment it was found."""

    state: str
    """The kernel's word, like `S (sleeping)`, `T (stopped)`, `D (disk sleep)`; empty where the system does not say."""
    waits_in: str
    """The kernel function it waits in."""
    stack: str
    """The threads, main thread first, latest call first; empty if it wrote none."""


def find(processes: Mapping[int, Path]) -> dict[int, Finding]:
    """Ask each process (its id, and the file it writes stacks to) for its stacks; wait at most a second for all."""
    before_bytes = {pid: _size(path) for pid, path in processes.items()}
    states = {pid: (_state(pid), _proc(pid, "wchan").strip("0\n")) for pid in processes}
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    _wait_until_written(processes, before_bytes)
    return {pid: Finding(*states[pid], _trimmed(path, before_bytes[pid])) for pid, path in processes.items()}


def _wait_until_written(processes: Mapping[int, Path], before_bytes: Mapping[int, int]) -> None:
    """Wait until every file has grown and has stayed the same for one poll; stopped processes use up the second."""
    deadline_s = time.monotonic() + _LIMIT_S
    last = dict(before_bytes)
    while time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        now = {pid: _size(path) for pid, path in processes.items()}
        if now == last and all(now[pid] > before_bytes[pid] for pid in processes):
            return
        last = now


def _trimmed(path: Path, start: int) -> str:
    """Return what was written after `start`, each thread cut to its latest calls."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    threads = [thread.splitlines() for thread in text.strip().split("\n\n")]
    # The main thread comes last in a dump, and is the one people look for.
    shown = ["\n".join(lines[:_NUM_LINES_OF_A_THREAD]) for lines in reversed(threads)]
    return "\n\n".join(shown)[:_NUM_CHARACTERS]


def _state(pid: int) -> str:
    lines = [line for line in _proc(pid, "status").splitlines() if line.startswith("State:")]
    return lines[0].split(None, 1)[1] if lines else ""


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
