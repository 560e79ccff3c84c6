"""Counters of an engine that go on where its process starts again: a new one begins at zero, what is told does not."""

from __future__ import annotations

from ferry.engines.request import Stats

GAUGES = ("num_running", "num_waiting", "kv_used")


class Totals:
    """What an engine has done so far, of all its processes together."""

    def __init__(self) -> None:
        self._before = self._last = Stats()
        self._process = 0

    def of(self, now: Stats | None, process: int) -> Stats:
        """Return the sum with what process number `process` says now; None = it does not say, and the last is kept."""
        if process != self._process:
            self._before, self._process = without_gauges(self._last), process
            self._last = self._before
        if now is not None:
            self._last = added(self._before, now)
        return self._last


def added(before: Stats, now: Stats) -> Stats:
    """Return gauges as they are now, and counters added to those before."""
    counters = {name: value + getattr(before, name) for name, value in now._asdict().items() if name not in GAUGES}
    return now._replace(**counters)


def without_gauges(stats: Stats) -> Stats:
    """Return the counters alone, as where no process is."""
    return stats._replace(num_running=0, num_waiting=0, kv_used=0.0)
