"""Ties between a process and its parent: it shall not outlive it.

Linux can tell a process that its parent has died. Elsewhere the socket to the parent, or `Seat.beat`, notices.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(signum: signal.Signals, parent: int) -> None:
    """Ask for a signal at the death of the parent, and take it now if that has happened already."""
    _ask_for_signal(signum)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def survive_parent() -> None:
    """Take back what `die_with_parent` asked for."""
    _ask_for_signal(0)


def _ask_for_signal(signum: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


def num_threads() -> int:
    """Return how many threads this process has, those of libraries included; 1 where the system does not say."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
