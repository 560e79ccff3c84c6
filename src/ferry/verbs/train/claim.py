"""One command and one crew at a time work in the directory of a run: locks that end with their holder, however it ends.

A command that was killed may leave a crew that is still saving. The next crew waits until it has left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferry.core.errors import OutputError

COMMAND, CREW = ".ferry-command.lock", ".ferry-crew.lock"
CREW_LIMIT_S = 90.0
"""More than the grace a crew has for saving when its command has gone."""
POLL_S = 0.05
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Some network file systems cannot lock: there this promise is the user's."""


@contextmanager
def claim(path: Path, limit_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file; refuse if another process holds it for longer than `limit_s`."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        _lock(fd, path.parent, limit_s)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, directory: Path, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise OutputError(
                    f"another process is training in {directory}", code="output.busy", repair="wait for it, or stop it"
                ) from None
            time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return
