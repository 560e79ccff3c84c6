"""Answers that go out: JSON at once, or server-sent events as they come; and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ferry.verbs.serve.http.answering import closing

NEW_LINES = {mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
"""Ends of lines for Unicode, and not for JSON: some clients would cut an event there."""
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up: there is no one to answer."""


def json_bytes(value: Any) -> bytes:
    """Return compact JSON. What is no number in JSON must not be in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for mark, escaped in NEW_LINES.items():
        text = text.replace(mark, escaped)
    return text.encode("utf-8", "replace")


def event(value: Any, name: str = "") -> bytes:
    """Return one server-sent event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + json_bytes(value) + b"\n\n"


def answer_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


class EventStream(Response):
    """Sends events while they are made; ends making them when the client goes away, or reads nothing for long."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], unread_s: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._unread_s = unread_s
        self._held_up = 0
        """The number of the event that the client has yet to take; 0 = none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        await until_gone(receive, self._send_all(send), self._unread())

    async def _send_all(self, send: Send) -> None:
        async with closing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            number = 0
            async for one in events:
                self._held_up = number = number + 1
                await send({"type": "http.response.body", "body": one, "more_body": True})
                self._held_up = 0
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _unread(self) -> None:
        """Return when the client has left an event untaken for long. It holds a place that others want."""
        before = 0
        while not before or before != self._held_up:
            before = self._held_up
            await asyncio.sleep(self._unread_s)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work makes, or cancel it and raise ClientGoneError when the client goes away before."""
    return await until_gone(request.receive, work)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], *ends: Coroutine[Any, Any, None]) -> T:
    """Do some work while the connection is there and none of `ends` has come. The body must have been read."""
    working = asyncio.create_task(work)
    gone = [asyncio.create_task(one) for one in (_gone(receive), *ends)]
    try:
        await asyncio.wait((working, *gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, *gone):
            task.cancel()
        await asyncio.gather(working, *gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
