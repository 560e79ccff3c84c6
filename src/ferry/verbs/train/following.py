"""What the command line shows while a crew trains: one line of progress read from metrics.jsonl, and the events."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from ferry.core.metrics import METRICS_FILE, MetricsTail, StepMetrics
from ferry.core.progress import Reporter
from ferry.verbs.train.job import Job

POLL_S = 0.5
NUM_CURVE = 40
SAID = {
    "resumed": "goes on after step {step}",
    "rejected": "checkpoint of step {step} is damaged and not used: {reason}",
    "restart": "rank {rank} failed at step {step} ({cause}): starting again",
    "hang": "rank {rank} hangs at step {step}",
    "validated": "validation loss {validation_loss:.4f} after step {step}",
    "stopping": "stopping: saving first",
}
"""Events that people are told, and how; the others are only noted."""


class Follower:
    """Reads the metrics of a run as they are written, and takes the events of its crew."""

    def __init__(self, job: Job, reporter: Reporter) -> None:
        self._job, self._reporter = job, reporter
        self._tail = MetricsTail(job.output / METRICS_FILE)
        self._curve: deque[float] = deque(maxlen=NUM_CURVE)
        self._shown = 0
        self._started = False
        self._lock = threading.Lock()

    def event(self, event: dict[str, Any]) -> None:
        """Take one event of the crew."""
        fields = {key: value for key, value in event.items() if key not in ("event", "ts")}
        self._reporter.event(str(event["event"]), **fields)
        words = SAID.get(str(event["event"]))
        if words is not None:
            self._reporter.say(words.format_map(_Lenient(fields)))
        if event["event"] in ("resumed", "fresh"):
            self._begin(int(event.get("step", 0)))

    def follow(self, ended: threading.Event) -> None:
        """Show new steps until told that the run has ended."""
        while not ended.wait(POLL_S):
            self._look()
        self._look()

    def finish(self) -> None:
        """End what is shown; a run that failed before its first step has shown nothing."""
        with self._lock:
            if self._started:
                self._reporter.finish()
            self._started = False

    def _begin(self, step: int) -> None:
        with self._lock:
            if self._started:
                self._reporter.finish()
            self._reporter.start("training", self._job.steps, "steps", step)
            self._started, self._shown = True, step

    def _look(self) -> None:
        steps = [line for line in self._tail.new() if isinstance(line, StepMetrics)] if self._started else []
        if not steps:
            return
        with self._lock:
            last = steps[-1]
            self._curve.extend(step.loss for step in steps)
            self._reporter.advance(max(0, last.step - self._shown))
            self._shown = max(self._shown, last.step)
            self._reporter.status(_text(last), list(self._curve))


class _Lenient(dict[str, Any]):
    """Fields of an event; one that it does not have is a question mark."""

    def __missing__(self, key: str) -> str:
        return "?"


def _text(last: StepMetrics) -> str:
    return f"loss {last.loss:.4f}  lr {last.lr:.1e}  {last.tokens_per_s:,.0f} tok/s"
