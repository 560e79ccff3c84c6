"""The supervisor of one node: import once, fork workers, watch them, start them again.

It computes nothing, touches no device and has one thread, so that every fork is a clean one. It promises: the end of a
worker is seen within 0.1 s; a worker that makes no progress is found and its stack is in the events; no process of the
crew outlives it; a user's mistake is reported at once, and a step that fails again and again ends the run.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from ferry.core.record import describe_error
from ferry.core.verb import load
from ferry.verbs.train.crew import hands
from ferry.verbs.train.crew.board import Board
from ferry.verbs.train.crew.channel import Channel, wait_for_any
from ferry.verbs.train.crew.contact import Contact
from ferry.verbs.train.crew.events import EventLog
from ferry.verbs.train.crew.hands import Hand
from ferry.verbs.train.crew.hang import Watch
from ferry.verbs.train.crew.kinship import num_threads, survive_parent
from ferry.verbs.train.crew.patience import Tally, failure_of_exit, failure_of_report, first_cause
from ferry.verbs.train.crew.seat import Seat, is_stopped
from ferry.verbs.train.crew.spec import CrewSpec, Failure, Outcome, Restart
from ferry.verbs.train.crew.worker import Entry, Report, Task

_POLL_S = 0.1
_SETTLE_S = 0.2
"""After the first failure: time for others to tell theirs, because the first one seen may be an echo."""
_FLUSH_S = 5.0


class Ending(NamedTuple):
    """How a generation ended. `raised` means that another node has started a new one."""

    kind: Literal["done", "stopped", "failed", "raised"]
    failure: Failure | None = None
    detected_s: float = 0.0


def supervise(spec: CrewSpec, command: Channel, folder: Path) -> None:
    """Run a crew to its end and tell the command. `folder` is a temporary directory, removed at the end."""
    try:
        for module in spec.preload:
            import_module(module)
        outcome = _Supervisor(spec, load(spec.entry), command, folder).run()
    except Exception as error:  # noqa: BLE001 - the border of the process: the command reports it
        outcome = Outcome("failed", failure=failure_of_report(describe_error(error), None, 0))
    command.send({"outcome": outcome.to_json()})
    command.flush(_FLUSH_S)
    shutil.rmtree(folder, ignore_errors=True)


class _Supervisor:
    def __init__(self, spec: CrewSpec, entry: Entry, command: Channel, folder: Path) -> None:
        self.spec = spec
        self.entry = entry
        self.command = command
        self.folder = folder
        self.logs = spec.output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        node = spec.cluster.node_rank
        self.log = EventLog(spec.output / ("events.jsonl" if node == 0 else f"events-node-{node:05d}.jsonl"))
        self.board = Board(spec.num_workers)
        self.watch = Watch(spec, self.board)
        self.tally = Tally(spec.same_step_limit, spec.max_restarts)
        self.hands: list[Hand] = []
        self.restarts: list[Restart] = []
        self.generation = 0
        self.run_name = folder.name
        self.num_stop_signals = 0
        self.kill_at_s = 0.0
        self.looked_s = self.before_s = time.monotonic()

    def run(self) -> Outcome:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._on_stop_signal)
        survive_parent()  # from here on the end of the command's channel tells it
        gc.collect()
        gc.freeze()  # what was imported stays shared between all workers
        if num_threads() > 1:
            self._event("choice", what="fork", reason=f"an import has started threads: {num_threads()} in all")
        self.contact = Contact(self.spec, [self.command])
        try:
            ending = self._adopt_generation(0)
            while ending is None:
                ending = self._run_generation()
            return self._close(ending)
        finally:
            hands.kill(self.hands, self._listen_to)
            self.log.close()

    def _run_generation(self) -> Ending | None:
        """Run one generation; return the ending of the run, or none if another generation shall follow."""
        self._fork()
        ending = self._watch()
        start_s = time.monotonic()
        left = hands.kill(self.hands, self._listen_to)
        assert not left, f"processes {[hand.pid for hand in left]} cannot be killed: the kernel or a driver holds them"
        killed_s = time.monotonic() - start_s
        if ending.kind in ("done", "stopped"):
            return ending
        failure = ending.failure or Failure("train.other-node", "another node has started a new generation")
        if ending.kind == "failed":
            verdict = self.tally.verdict(failure)
            if verdict is not None or not self.spec.restart:
                return Ending("failed", verdict or failure)
        restart = Restart(self.generation, failure.rank, failure.step, failure.message, ending.detected_s)
        self.contact.raise_generation(self.generation + 1)
        ended = self._adopt_generation(self.generation + 1)
        if ended is not None:
            return ended
        self.restarts.append(restart)
        fields = {**restart._asdict(), "generation": self.generation, "code": failure.code}
        self._event("restart", **fields, killed_s=round(killed_s, 3), traceback=failure.traceback[-2000:])
        return None

    def _adopt_generation(self, generation: int) -> Ending | None:
        """Enter a generation together with the other nodes; return an ending if that is not to be."""
        if self.contact.channel is None:
            self.generation = generation
            return None
        while self.contact.generation() < generation:
            self._look()
            failure = self.contact.failure()
            if failure is not None:
                return Ending("failed", failure)
            if self.board.stop_requested():
                return Ending("stopped")
        self.generation, self.run_name = self.contact.generation(), self.contact.run_name()
        return None

    # Forking

    def _fork(self) -> None:
        start_s = time.monotonic()
        self.board.clear()
        self.hands = []
        first_rank = self.spec.cluster.node_rank * self.spec.num_workers
        for row in range(self.spec.num_workers):
            task = Task(
                entry=self.entry,
                payload=self.spec.payload,
                seat=self._seat(first_rank + row, row),
                rank=first_rank + row,
                logs=self.logs,
                board=self.board,
                supervisor=os.getpid(),
            )
            self.hands.append(hands.fork(task, row, self._channels()))
        self.looked_s = time.monotonic()
        forked_s, workers = round(self.looked_s - start_s, 4), {hand.rank: hand.pid for hand in self.hands}
        self._event("started", generation=self.generation, workers=workers, forked_s=forked_s)

    def _seat(self, rank: int, row: int) -> Callable[[Report], Seat]:
        """Return what makes the seat, once the worker lives."""
        cluster, num_workers, generation = self.spec.cluster, self.spec.num_workers, self.generation

        def make(report: Report) -> Seat:
            return Seat(
                rank=rank,
                world_size=cluster.num_nodes * num_workers,
                local_rank=row,
                local_world_size=num_workers,
                cluster=cluster,
                generation=generation,
                attempt=f"{self.run_name}-{generation}",
                board=self.board,
                row=row,
                report=report,
                file_store=self.folder / f"store-{generation}",
            )

        return make

    # Watching

    def _watch(self) -> Ending:
        """Return when this generation has ended, in whatever way. Workers may still live."""
        while True:
            self._look()
            ending = self._stopping() or self._called_off()
            if ending is not None:
                return ending
            if any(hand.has_failed() for hand in self.hands):
                return self._gather(time.monotonic() - self.before_s)
            if all(hand.exit_code == 0 for hand in self.hands):
                self.contact.say_finished(self.generation)
                if self.contact.all_finished(self.generation):
                    is_early = any(is_stopped(hand.last["result"]) for hand in self.hands)
                    return Ending("stopped" if is_early else "done")
            hung = self.watch.hung(self.hands)
            if hung is not None:
                failure, fields = self.watch.describe(hung, self.hands)
                self._event("hang", generation=self.generation, **fields)
                return Ending("failed", failure, fields["silence_s"])

    def _look(self) -> None:
        """Wait a moment for news of any kind, and take it in."""
        wait_for_any(self._channels(), _POLL_S)
        self.command.flush()
        self.command.receive()
        self.contact.listen()
        for hand in self.hands:
            hand.look_for_end()
            self._listen_to(hand)
        if self.command.is_closed or self.num_stop_signals or self.contact.wants_stop():
            self.board.request_stop()
        self.before_s, self.looked_s = self.looked_s, time.monotonic()
        self.watch.note_gap(self.looked_s - self.before_s)

    def _stopping(self) -> Ending | None:
        """While the crew is asked to stop: wait for the workers, for as long as the grace lasts."""
        if not self.board.stop_requested():
            return None
        self.contact.say_stop()
        self.kill_at_s = self.kill_at_s or time.monotonic() + self.spec.grace_s
        if any(hand.has_failed() for hand in self.hands):
            return Ending("stopped", self._gather(0.0).failure)
        if self.num_stop_signals > 1 or time.monotonic() > self.kill_at_s:
            reason = "a second signal came" if self.num_stop_signals > 1 else f"{self.spec.grace_s:g} s were over"
            repair = "start the run again: it resumes from the last checkpoint"
            message = f"the workers were killed before they had saved: {reason}"
            return Ending("stopped", Failure("train.killed-while-stopping", message, repair))
        return None

    def _called_off(self) -> Ending | None:
        failure = self.contact.failure()
        if failure is not None:
            return Ending("failed", failure)
        return Ending("raised") if self.contact.generation() > self.generation else None

    def _gather(self, detected_s: float) -> Ending:
        """Let the other workers say what they have to say, and return the first cause."""
        in_order: list[Hand] = []
        deadline_s = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline_s:
            in_order += [hand for hand in self.hands if hand.has_failed() and hand not in in_order]
            self._look()
        return Ending("failed", first_cause([self._failure(hand) for hand in in_order]), round(detected_s, 3))

    def _failure(self, hand: Hand) -> Failure:
        step = self.board.read(hand.row).step
        if "failure" in hand.last:
            return failure_of_report(hand.last["failure"], hand.rank, step)
        assert hand.exit_code is not None
        return failure_of_exit(hand.rank, step, hand.exit_code, str(hand.log.relative_to(self.spec.output)))

    # Speaking and leaving

    def _close(self, ending: Ending) -> Outcome:
        assert ending.kind != "raised"
        failure = ending.failure
        if ending.kind == "failed" and failure is not None:
            self._event("failed", **asdict(failure))
            if self.contact.failure() is None:
                self.contact.say_failed(failure)
        if ending.kind == "stopped":
            step = max(self.board.read(row).step for row in range(self.spec.num_workers))
            self._event("stopped", step=step, clean=failure is None, cause=failure.message if failure else "")
        self.contact.leave()
        result = self.hands[0].last.get("result") if self.hands else None
        return Outcome(ending.kind, result, failure, tuple(self.restarts))

    def _channels(self) -> list[Channel]:
        meeting = [self.contact.channel] if self.contact.channel else []
        return [self.command, *meeting, *(hand.channel for hand in self.hands)]

    def _listen_to(self, hand: Hand) -> None:
        for event in hand.listen():
            if event["event"] == "saved" and isinstance(event.get("step"), int):
                self.tally.saved(event["step"])
            self._relay(event)

    def _on_stop_signal(self, signum: int, frame: FrameType | None) -> None:
        self.num_stop_signals += 1

    def _event(self, name: str, **fields: Any) -> None:
        self._relay({"ts": round(time.time(), 3), **fields, "event": name})

    def _relay(self, event: Mapping[str, Any]) -> None:
        self.log.append(event)
        self.command.send(event)
