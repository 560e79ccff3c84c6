"""`ferry` as a process that is forked from the test's: it has imported nothing anew, and so begins at once.

The command itself is the real one, from its words to its exit status, with its own session, output and signals, and the
processes that it starts are programs of their own. What a fork cannot show, that the command starts from nothing, is
shown by the tests that give `program`, and by those of the command line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

FORK = get_context("fork")
REAL = ("-m", "ferry")
"""The arguments of a Python that starts the command from nothing."""


class Forked:
    """A running `ferry`, with the methods of `subprocess.Popen` that tests use. What it says is appended to `log`."""

    def __init__(self, log: Path, words: Sequence[str], environ: Mapping[str, str]) -> None:
        self._process = FORK.Process(target=_run, args=(log, list(words), dict(environ)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise TimeoutError(f"the command has not ended after {timeout} s")
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _run(log: Path, words: list[str], environ: dict[str, str]) -> None:
    """Become the command: in a session of its own, reading nothing, and with its own output."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number, stream in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environ)
    from ferry.cli import main

    status = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
