"""Who may come in, and when: a bounded queue before the engine, and a door that closes when the server ends.

A *place* is room for one answer in the engine. Answers wait for theirs; a request of many answers is many that wait.
When too many wait, the next request is told to come back; so no client waits for hours, and memory stays bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ferry.verbs.serve.http.errors import busy

MAX_RETRY_AFTER_S = 60


class Gate:
    """Counts requests that are inside, and answers that wait, in one event loop."""

    def __init__(self, num_places: int, max_waiting: int) -> None:
        self._places = asyncio.Semaphore(num_places)
        self._num_places = num_places
        self._max_waiting = max_waiting
        self._mean_s = 1.0
        self._empty = asyncio.Event()
        self._empty.set()
        self.num_waiting = 0
        self.num_inside = 0
        self.is_closed = False

    def check(self) -> None:
        """Refuse a request that cannot come in now. For a look before the work of reading a request is done."""
        if self.is_closed:
            raise busy(503, "the server is stopping", code="serve.stopping")
        if self._places.locked() and self.num_waiting >= self._max_waiting:
            raise busy(
                429,
                f"as many answers as may are waiting (max_queue={self._max_waiting})",
                code="rate_limit_exceeded",
                retry_after_s=self._retry_after_s(),
            )

    @asynccontextmanager
    async def visit(self, num_answers: int, waited: Callable[[float], None]) -> AsyncIterator[Visit]:
        """Be a request that is inside; `waited` is told the seconds until it had its first place."""
        self.check()
        visit = Visit(self, num_answers, waited)
        self.num_inside += 1
        self.num_waiting += num_answers
        self._empty.clear()
        try:
            yield visit
        finally:
            visit.end_waiting()
            self.num_inside -= 1
            if not self.num_inside:
                self._empty.set()

    def close(self) -> None:
        """Let nobody in any more."""
        self.is_closed = True

    async def empty(self, timeout_s: float) -> bool:
        """Wait until all requests are out; return whether they are."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def _retry_after_s(self) -> int:
        """Return when the queue will be shorter, by how long answers took lately."""
        seconds = self._mean_s * (self.num_waiting + 1) / self._num_places
        return int(min(max(seconds, 1), MAX_RETRY_AFTER_S))


class Visit:
    """A request that is inside."""

    def __init__(self, gate: Gate, num_answers: int, waited: Callable[[float], None]) -> None:
        self._gate = gate
        self._num_waiting = num_answers
        self._waited = waited
        self._came_s = time.monotonic()
        self._has_waited = False

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Have room for one answer, in the order of asking."""
        async with self._gate._places:
            if not self._has_waited:
                self._has_waited = True
                self._waited(time.monotonic() - self._came_s)
            self._leave_queue(1)
            begun_s = time.monotonic()
            try:
                yield
            finally:
                self._gate._mean_s += 0.1 * (time.monotonic() - begun_s - self._gate._mean_s)

    def end_waiting(self) -> None:
        """Have no answers any more that wait."""
        self._leave_queue(self._num_waiting)

    def _leave_queue(self, num_answers: int) -> None:
        self._num_waiting -= num_answers
        self._gate.num_waiting -= num_answers
