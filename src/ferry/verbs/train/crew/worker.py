"""The life of a worker after the fork: tie itself to its parent, send its output to files, call the entry, report.

The worker never returns into the supervisor's code. What it returns or raises travels through its channel; its exit
status is 0 if the entry returned and 1 if it raised.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from ferry.core.record import describe_error
from ferry.verbs.train.crew.board import Board
from ferry.verbs.train.crew.channel import encode
from ferry.verbs.train.crew.kinship import die_with_parent
from ferry.verbs.train.crew.seat import Seat

Entry = Callable[[Seat, Any], Any]
Report = Callable[[dict[str, Any]], None]
_RAISED = 1


class Task(NamedTuple):
    """What a worker does, and the place it does it at. `seat` is made after the fork."""

    entry: Entry
    payload: Any
    seat: Callable[[Report], Seat]
    rank: int
    logs: Path
    board: Board
    supervisor: int
    """The process id of the parent."""


def log_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank:05d}.log"


def stacks_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank:05d}.stacks"


def work(task: Task, end: socket.socket) -> NoReturn:
    """Do the task, report, and end the process."""
    end.setblocking(True)
    lock = threading.Lock()

    def report(message: dict[str, Any]) -> None:
        with lock:
            end.sendall(encode(message))

    status = _RAISED
    try:
        with open(stacks_path(task.logs, task.rank), "ab", buffering=0) as stacks:
            _settle(task)
            faulthandler.enable(file=2)
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
            report({"result": task.entry(task.seat(report), task.payload)})
            status = 0
    except BaseException as error:  # noqa: BLE001 - the border of the process: the supervisor decides
        described = describe_error(error)
        sys.stderr.write(described["traceback"])
        report({"failure": {**described, "rank": task.rank}})
    finally:
        os._exit(status)


def _settle(task: Task) -> None:
    # A group of its own: what a worker starts is killed with it.
    os.setpgid(0, 0)
    die_with_parent(signal.SIGKILL, task.supervisor)
    fd = os.open(log_path(task.logs, task.rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)

    def stop(signum: int, frame: FrameType | None) -> None:
        task.board.request_stop()

    # A scheduler may send SIGTERM to every process of a job, and a terminal SIGINT: neither may tear a step.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
