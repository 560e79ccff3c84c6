"""Ends the engine's process when it lives and says nothing: stopped, deadlocked, or held up in one step.

The process says that it is there every few seconds, whatever it is doing; see `child.py`. Beats are counted, not
seconds: a parent that was stopped itself finds them waiting, and blames nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import Process

from ferry.engines.native.messages import BEAT_S

SILENCE_S = 40.0
"""After so long it is taken for hung. Reading a large tensor from a slow disk may stop all of its threads a while."""


class Watch:
    """Watches a process in the running event loop until it is told to end."""

    def __init__(self, process: Process, silence_s: float) -> None:
        self._process = process
        self._silence_s = silence_s
        self._num_heard = 0
        self._task = asyncio.create_task(self._look())
        self.has_ended_it = False

    def heard(self) -> None:
        """Note that the process said something."""
        self._num_heard += 1

    def end(self) -> None:
        """Watch no more."""
        self._task.cancel()

    async def _look(self) -> None:
        silent_s = 0.0
        while silent_s < self._silence_s:
            num_before = self._num_heard
            await asyncio.sleep(BEAT_S)
            silent_s = silent_s + BEAT_S if self._num_heard == num_before else 0.0
        self.has_ended_it = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
