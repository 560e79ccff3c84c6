"""A server by other hands with the OpenAI API, as small as one can be: it says what a test gave it to say.

It knows no `guided` and no `/ready`, as most servers do, and keeps every request it got.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


class ForeignServer(ThreadingHTTPServer):
    """Answers with `pieces`. `refusal` is a status and message instead; `is_endless`: it goes on until it is left;
    `room`: it refuses a higher `max_tokens`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pieces: Sequence[str] = ("Good ", "day", ".")
        self.finish: str | None = "stop"
        self.refusal: tuple[int, str] | None = None
        self.room: int | None = None
        self.key = ""
        self.is_endless = False
        self.was_left = threading.Event()
        self.requests: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def foreign_server() -> Iterator[ForeignServer]:
    """A server that runs while the block does."""
    server = ForeignServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ForeignServer

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "barque", "max_model_len": 512}, {"id": "brig"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._json(401, {"error": {"message": "wrong key", "request_id": "request-7"}})
        elif self.server.refusal:
            status, message = self.server.refusal
            self._json(status, {"error": {"message": message}})
        elif self.server.room is not None and body.get("max_tokens", 0) > self.server.room:
            self._json(400, {"error": {"message": f"max_tokens is more than {self.server.room}"}})
        else:
            self._stream()

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in self.server.pieces:
            self._event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        if self.server.is_endless:
            self._until_left()
        if self.server.finish:
            self._event({"choices": [{"delta": {}, "finish_reason": self.server.finish}]})
            self._event({"choices": [], "usage": USAGE})
            self.wfile.write(b"data: [DONE]\n\n")

    def _until_left(self) -> None:
        self.connection.settimeout(20)
        # The client sends no more: what can be read is its end.
        if self.connection.recv(1) == b"":
            self.server.was_left.set()

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
