"""The rules of the watch as plain functions of numbers: how long a worker may be silent, which failure was the first,
and when another try has no sense.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ferry.verbs.train.crew.board import PHASES, Beat
from ferry.verbs.train.crew.spec import CrewSpec, Failure

_TRAINING = PHASES.index("training")
_NUM_KNOWN_STEPS = 3
_LOST_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|socket closed", re.IGNORECASE)


def limit_s(beat: Beat, spec: CrewSpec) -> float:
    """Return how long a worker with this last beat may be silent."""
    if beat.phase != _TRAINING or beat.num_steps < _NUM_KNOWN_STEPS:
        return spec.quiet_limit_s
    return spec.hang_factor * beat.median_ns / 1e9 + spec.hang_slack_s


def failure_of_exit(rank: int, step: int, exit_code: int, log: str) -> Failure:
    """Describe a worker that ended without a report. `exit_code` is negative for a signal."""
    if exit_code >= 0:
        message = f"rank {rank} left with exit status {exit_code} and without a report, in step {step}"
        return Failure("train.worker-exit", message, f"see {log}", rank, step)
    name = signal.strsignal(-exit_code)
    message = f"rank {rank} was killed by signal {-exit_code} ({name}) in step {step}"
    hint = "out of memory? see dmesg, and " if -exit_code == signal.SIGKILL else "see "
    return Failure("train.worker-killed", message, f"{hint}{log}", rank, step)


def failure_of_report(report: Mapping[str, Any], rank: int | None, step: int) -> Failure:
    """Describe an exception: `report` is what `ferry.core.record.describe_error` made of it."""
    if "exit_status" in report:
        return Failure.from_json({**report, "rank": rank, "step": step})
    where = "the supervisor" if rank is None else f"rank {rank}"
    text = " ".join(f"{report['type']}: {report['message']}".split())
    return Failure.from_json({**report, "message": f"{where}: {text}", "rank": rank, "step": step})


def first_cause(failures: Sequence[Failure]) -> Failure:
    """Return the failure that caused the others: of several in the order they were seen, one that is no echo.

    A rank that dies takes the connections of the others with it: those fail too, a moment later.
    """

    def weight(failure: Failure) -> int:
        if not failure.may_pass:
            return 0
        return 2 if _LOST_PEER.search(failure.message) else 1

    return min(failures, key=weight)


@dataclass
class Tally:
    """Counts failures, so that a run that cannot get on stops."""

    same_step_limit: int
    max_restarts: int
    last_step: int = -1
    num_alike: int = 0
    num_restarts: int = 0
    saved_step: int = -1

    def saved(self, step: int) -> None:
        """A new checkpoint is progress, wherever the next failure is."""
        if step > self.saved_step:
            self.saved_step, self.last_step = step, -1
            self.num_alike = self.num_restarts = 0

    def verdict(self, failure: Failure) -> Failure | None:
        """Count a failure; return why to give up, or none if another try makes sense."""
        got_further = failure.step > self.last_step
        self.num_alike = 1 if got_further else self.num_alike + 1
        self.last_step = failure.step
        self.num_restarts += 1
        if not failure.may_pass:
            return failure
        if self.num_alike >= self.same_step_limit:
            finding, code = f"step {failure.step} failed {self.num_alike} times without progress", "train.no-progress"
        elif self.num_restarts > self.max_restarts:
            finding, code = f"{self.max_restarts} restarts brought no new checkpoint", "train.too-many-restarts"
        else:
            return None
        return replace(failure, code=code, message=f"{finding}; the last cause: {failure.message}")
