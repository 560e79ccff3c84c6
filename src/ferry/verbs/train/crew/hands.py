"""The workers of one generation as the supervisor holds them: fork, look after, kill.

Each worker leads a process group of its own, so that what it has started is killed with it.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ferry.verbs.train.crew.channel import Channel
from ferry.verbs.train.crew.worker import Task, log_path, stacks_path, work

_BURIAL_LIMIT_S = 30.0
_POLL_S = 0.005


@dataclass(eq=False)
class Hand:
    """One worker: its place, its process, and what it has said so far."""

    rank: int
    row: int
    """Its row on the board, which is its local rank."""
    pid: int
    channel: Channel
    stacks: Path
    log: Path
    exit_code: int | None = None
    """None while it lives; negative if a signal ended it."""
    last: dict[str, Any] = field(default_factory=dict)
    """`{"result": ...}` or `{"failure": ...}`, once it has reported."""

    def listen(self) -> list[dict[str, Any]]:
        """Return its new events, and keep its last words."""
        messages = self.channel.receive()
        for message in messages:
            if "event" not in message:
                self.last = message
        return [message for message in messages if "event" in message]

    def look_for_end(self) -> None:
        """See whether it has ended; whatever it had started then ends too."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                _signal_group(self.pid)

    def has_failed(self) -> bool:
        """Say whether it has ended badly, or has said that it is about to."""
        has_ended = self.exit_code is not None
        return "failure" in self.last or (has_ended and (self.exit_code != 0 or "result" not in self.last))


def fork(task: Task, row: int, close_in_child: Sequence[Channel]) -> Hand:
    """Fork one worker."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        for channel in close_in_child:
            channel.close()
        work(task, theirs)
    theirs.close()
    with suppress(OSError):
        os.setpgid(pid, pid)  # the worker does it too: whoever comes first
    return Hand(task.rank, row, pid, Channel(ours), stacks_path(task.logs, task.rank), log_path(task.logs, task.rank))


def kill(hands: Sequence[Hand], last_words: Callable[[Hand], None]) -> list[Hand]:
    """Kill all that live and wait for their end; return those that the kernel does not let go."""
    for hand in hands:
        if hand.exit_code is None:
            _signal_group(hand.pid)
            with suppress(ProcessLookupError):
                os.kill(hand.pid, signal.SIGKILL)  # in case it had no group of its own yet
    deadline_s = time.monotonic() + _BURIAL_LIMIT_S
    while any(hand.exit_code is None for hand in hands) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        for hand in hands:
            hand.look_for_end()
    for hand in hands:
        last_words(hand)
        hand.channel.close()
    return [hand for hand in hands if hand.exit_code is None]


def _signal_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS answers a group of zombies with the latter
        os.killpg(pid, signal.SIGKILL)
