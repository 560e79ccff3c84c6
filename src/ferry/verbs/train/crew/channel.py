"""JSON lines between two processes over a socket pair, without ever waiting for the other side.

What cannot be sent at once is kept and sent later, so a supervisor whose reader is slow still watches its workers. The
end of the other process shows as `is_closed`. A torn last line, left by a process that was killed, is ignored.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

_CHUNK_BYTES = 1 << 16


class Channel:
    """One end of a socket pair."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._incoming = b""
        self._outgoing = bytearray()
        self._is_torn = False
        self.is_closed = False

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self.is_closed = True
        self._end.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message, now or with a later `flush`. Nothing happens when the other side has gone."""
        self._outgoing += encode(message)
        self.flush()

    def flush(self, limit_s: float = 0.0) -> None:
        """Send what is waiting, for at most so many seconds."""
        deadline_s = time.monotonic() + limit_s
        while self._outgoing and not self.is_closed:
            try:
                del self._outgoing[: self._end.send(self._outgoing)]
            except BlockingIOError:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return
                select.select([], [self._end], [], left_s)
            except (BrokenPipeError, ConnectionResetError):
                self._outgoing.clear()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived; do not wait for any."""
        # A signal may raise an exception in here and lose bytes: the next call then begins with the next line.
        was_torn, self._is_torn = self._is_torn, True
        while not self.is_closed:
            try:
                chunk = self._end.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                self.close()
            self._incoming += chunk
        *lines, self._incoming = self._incoming.split(b"\n")
        self._is_torn = was_torn and not lines
        return [json.loads(line) for line in (lines[1:] if was_torn else lines)]


def encode(message: Mapping[str, Any]) -> bytes:
    return (json.dumps(message, ensure_ascii=False, default=str) + "\n").encode(errors="replace")


def wait_for_any(channels: Iterable[Channel], timeout_s: float) -> None:
    """Return when a channel has something to read, or at the end of the time, or after a signal."""
    poll = select.poll()
    for channel in channels:
        if not channel.is_closed:
            poll.register(channel, select.POLLIN)
    poll.poll(timeout_s * 1000)
