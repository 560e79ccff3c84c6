"""An engine in an event loop on a thread, and doors to it: servers on free ports with settings of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

from ferry.engines.engine import Engine, EngineSettings, find
from ferry.engines.text import TextModel, open_text
from ferry.verbs.serve.http.app import make_app
from ferry.verbs.serve.http.listening import Listener
from ferry.verbs.serve.http.served import HttpSettings, Served

NAME = "small"
T = TypeVar("T")


class Door(NamedTuple):
    """A server that is listening."""

    url: str
    served: Served
    client: httpx.Client

    def post(self, path: str, body: Any, **further: Any) -> httpx.Response:
        return self.client.post(path, json=body, **further)


class House:
    """An engine in an event loop on a thread, and the servers before it."""

    def __init__(self, model: Path) -> None:
        self.path = model
        self.model: TextModel = open_text(model)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="house")
        self._thread.start()
        self._listeners: list[tuple[Listener, Served]] = []
        settings = EngineSettings(model=model, max_num_seqs=8, kv_cache_memory_bytes=64_000_000, threads=1)
        self.engine: Engine = find("native").make(settings)
        self.do(self.engine.start())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=120)

    def open(self, **settings: Any) -> Door:
        """Open a server with settings that differ from the usual ones."""
        return self.do(self._open(settings))

    async def _open(self, settings: dict[str, Any]) -> Door:
        defaults = HttpSettings(names=(NAME, str(self.path)), shown_names=(NAME,), max_num_seqs=8)
        served = Served(self.engine, self.model, replace(defaults, **settings))
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        listener = Listener(make_app(served), bound)
        await listener.open()
        self._listeners.append((listener, served))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        return Door(url, served, httpx.Client(base_url=url, timeout=60))

    def close(self) -> None:
        """End the servers and the engine."""
        self.do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        await self.engine.close()
        for listener, served in self._listeners:
            await listener.close()
            await served.close()
