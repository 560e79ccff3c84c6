"""The server on its socket: open at once, the model behind it when it is there, and an end that loses no answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from ferry.core.errors import UnavailableError
from ferry.verbs.serve.http.served import Served

KEEP_ALIVE_S = 65
WATCH_S = 0.5
LAST_WORDS_S = 5.0
"""Time for the last bytes to leave after the engine has ended."""


class Listener:
    """Listens while it is open. `address` is where."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(LAST_WORDS_S),
            server_header=False,
        )
        self._server = _Quiet(config)
        self._socket = bound
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Return when requests are taken."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise UnavailableError("the server ended before it had begun", code="serve.listening")
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Stop listening and close every connection."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Quiet(uvicorn.Server):
    """Leaves signals to the caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Do nothing."""
        yield


async def serve_until(served: Served, starting: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Return when it is time to stop; raise where the engine does not start or is gone for good."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return
        starting.result()
        served.note("ready", {"seconds": round(served.measures.clock() - served.begun_s, 2)})
        while not stop.is_set():
            condition = served.engine.condition
            if condition.state == "failed":
                raise UnavailableError(f"the engine failed: {condition.reason}", code="engine.failed")
            await asyncio.wait((stopping,), timeout=WATCH_S)
    finally:
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)


async def drain(served: Served, timeout_s: float) -> int:
    """Let nobody in, wait for those who are inside, end the engine; return how many answers were cut off."""
    served.gate.close()
    is_empty = await served.gate.empty(timeout_s)
    num_cut = 0 if is_empty else served.gate.num_inside
    await served.engine.close()
    await served.gate.empty(LAST_WORDS_S)
    await served.close()
    return num_cut
