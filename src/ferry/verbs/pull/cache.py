"""Where a pull keeps what is on its way: $FERRY_HOME/cache."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferry.core.record import home


def cache() -> Path:
    return home() / "cache"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let one process at a time fill a directory of the cache; others wait. The lock lies beside it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f"{directory.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
