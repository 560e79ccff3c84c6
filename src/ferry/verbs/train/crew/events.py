"""The event log of a run: one JSON object a line, appended, so that even a killed run leaves its story."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ferry.verbs.train.crew.channel import encode


class EventLog:
    """An open events.jsonl."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        size_bytes = os.fstat(self._fd).st_size
        if size_bytes and os.pread(self._fd, 1, size_bytes - 1) != b"\n":
            # The last writer was killed in the middle of a line. Without this, our first line would be lost with it.
            os.write(self._fd, b"\n")

    def append(self, event: Mapping[str, Any]) -> None:
        # One write of one line to an O_APPEND file: lines of several processes never mix.
        os.write(self._fd, encode(event))

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
