"""A command at a terminal of its own, typed at and read as a person would."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT_S = 30.0


class Terminal:
    """The other end of a pseudo-terminal."""

    def __init__(self, end_fd: int, process: subprocess.Popen[bytes]) -> None:
        self._end_fd = end_fd
        self._process = process
        self._new = ""
        self.text = ""
        """All that was shown, without colours."""

    def see(self, words: str) -> str:
        """Wait until something new is shown, and return what came up to its end."""
        assert self._comes(words, TIMEOUT_S), f"{words!r} was not shown after {self.text!r}"
        seen, _, self._new = self._new.partition(words)
        return seen + words

    def type(self, words: str) -> None:
        os.write(self._end_fd, words.encode())

    def interrupt(self, words: str) -> None:
        """Press Ctrl-C until it is answered: one that comes between a prompt and the wait for keys is noticed later."""
        presses = 0
        while not presses or not self._comes(words, TIMEOUT_S / 10):
            assert presses < 10, f"{words!r} was not shown after {self.text!r}"
            self.type("\x03")
            presses += 1
        self.see(words)

    def end(self) -> int:
        """Wait for the end of the command and return its exit status."""
        until_s = time.monotonic() + TIMEOUT_S
        while self._read(until_s):
            assert time.monotonic() < until_s, f"the command did not end: {self.text!r}"
        return self._process.wait(TIMEOUT_S)

    def _comes(self, words: str, timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        while words not in self._new and time.monotonic() < until_s:
            assert self._read(until_s), f"the command ended before {words!r}: {self.text!r}"
        return words in self._new

    def _read(self, until_s: float) -> bool:
        if not select.select([self._end_fd], [], [], max(until_s - time.monotonic(), 0))[0]:
            return True
        try:
            data = os.read(self._end_fd, 4096)
        except OSError:  # Linux says so when the command has closed its end
            return False
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", data.decode("utf-8", "replace")).replace("\r\n", "\n")
        self.text += shown
        self._new += shown
        return bool(data)


@contextmanager
def ferry_at_terminal(*words: str) -> Iterator[Terminal]:
    """Run `ferry` with words at a terminal; it is ended with the block."""
    end_fd, command_fd = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ferry", *words],
        stdin=command_fd,
        stdout=command_fd,
        stderr=command_fd,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=_own_terminal,
    )
    os.close(command_fd)
    try:
        yield Terminal(end_fd, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(end_fd)


def _own_terminal() -> None:
    """Make the pseudo-terminal the one whose Ctrl-C reaches this process."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
