"""The supervisor's end of the meeting of several nodes: what it says to the others, and the latest it has heard.

With one node there is no meeting; then every word is said to nobody, and nothing is ever heard.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ferry.verbs.train.crew.channel import Channel, wait_for_any
from ferry.verbs.train.crew.rendezvous import meet
from ferry.verbs.train.crew.spec import CrewSpec, Failure

_POLL_S = 0.05
_FAREWELL_S = 15.0


class Contact:
    def __init__(self, spec: CrewSpec, close_in_child: Sequence[Channel]) -> None:
        self.cluster = spec.cluster
        self.channel: Channel | None = None
        self._pid = 0
        self._said: set[str] = set()
        self._heard: dict[str, Any] = {}
        if spec.cluster.num_nodes > 1:
            ours, theirs = socket.socketpair()
            supervisor = os.getpid()
            self._pid = os.fork()
            if self._pid == 0:
                ours.close()
                for channel in close_in_child:
                    channel.close()
                meet(spec, theirs, supervisor)
            theirs.close()
            self.channel = Channel(ours)

    def listen(self) -> None:
        """Take in what has arrived."""
        if self.channel is not None:
            self.channel.flush()
            for message in self.channel.receive():
                self._heard |= message

    # What it says

    def raise_generation(self, generation: int) -> None:
        self._say("raise", generation)

    def say_finished(self, generation: int) -> None:
        self._say("finished", generation)

    def say_stop(self) -> None:
        self._say("stop", True)

    def say_failed(self, failure: Failure) -> None:
        where = f"node {self.cluster.node_rank}: {failure.message}"
        self._say("failed", asdict(replace(failure, message=where)))

    def leave(self) -> None:
        """Take leave, and wait until the last words have reached the others."""
        if self.channel is None:
            return
        self._say("leave", True)
        deadline_s = time.monotonic() + _FAREWELL_S
        while not self.channel.is_closed and time.monotonic() < deadline_s:
            wait_for_any([self.channel], _POLL_S)
            self.listen()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    # What it has heard

    def generation(self) -> int:
        """Return the generation all nodes shall be in; -1 until all nodes have met."""
        return int(self._heard.get("generation", -1))

    def run_name(self) -> str:
        return str(self._heard["run"])

    def all_finished(self, generation: int) -> bool:
        return self.channel is None or self._heard.get("done") == generation

    def wants_stop(self) -> bool:
        return "stop" in self._heard

    def failure(self) -> Failure | None:
        """Return why the run is over on all nodes, or none if it is not."""
        if "failed" in self._heard:
            return Failure.from_json(self._heard["failed"])
        if self.channel is not None and (self.channel.is_closed or "lost" in self._heard):
            found = self._heard.get("lost", "the process that talks to the other nodes has ended")
            return Failure("train.node-lost", found, "start the run again on all nodes", exit_status=7)
        return None

    def _say(self, word: str, value: Any) -> None:
        if self.channel is not None and f"{word} {value}" not in self._said:
            self._said.add(f"{word} {value}")
            self.channel.send({word: value})
