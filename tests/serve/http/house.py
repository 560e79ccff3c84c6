"""An engine in an event loop on a thread, and doors to it: servers on free ports with settings of their own."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import httpx

from ferry.engines.engine import Engine, EngineSettings, find
from ferry.engines.text import TextModel, open_text
from ferry.verbs.serve.http.app import make_app
from ferry.verbs.serve.http.listening import Listener
from ferry.verbs.serve.http.served import HttpSettings, Served

NAME = "small"
REQUESTS_OF_A_DOOR = 10_000
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

    def open(
        self,
        engine: Engine | None = None,
        *,
        send_bytes: int | None = None,
        num_asked: int | None = None,
        **settings: Any,
    ) -> Door:
        """Open a server with settings that differ from the usual ones, before this engine or another.

        `send_bytes` is what the system may hold of an answer that is not read. Requests are numbered from `num_asked`
        on; each server has numbers of its own.
        """
        first = REQUESTS_OF_A_DOOR * len(self._listeners) if num_asked is None else num_asked
        return self.do(self._open(engine or self.engine, send_bytes, first, settings))

    async def _open(self, engine: Engine, send_bytes: int | None, num_asked: int, settings: dict[str, Any]) -> Door:
        defaults = HttpSettings(names=(NAME, str(self.path)), shown_names=(NAME,), max_num_seqs=8)
        served = Served(engine, self.model, replace(defaults, **settings), num_asked=num_asked)
        bound = socket.socket()
        if send_bytes is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
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


class Output(threading.Thread):
    """The lines that a process writes, and waiting for one of them."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.lines: list[str] = []
        self._is_over = False
        self._more = threading.Condition()
        self.start()

    def run(self) -> None:
        for line in self._stream:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()
        with self._more:
            self._is_over = True
            self._more.notify_all()

    def wait_for(self, word: str) -> str:
        """Return the first line with a word in it."""
        with self._more:
            self._more.wait_for(lambda: self._is_over or any(word in line for line in self.lines), 60)
            found = next((line for line in self.lines if word in line), None)
        assert found, f"{word!r} is not in {self.lines}"
        return found


class ServeProcess(subprocess.Popen[str]):
    """`ferry serve` as a command."""

    def __init__(self, model: Path, home: Path, *words: str) -> None:
        command = [sys.executable, "-m", "ferry", "serve", str(model), "--threads", "1", "--kv-cache-memory", "64MB"]
        environment = {**os.environ, "FERRY_HOME": str(home)}
        super().__init__([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.stderr is not None
        self.said = Output(self.stderr)

    def end(self) -> str:
        """Wait for its end and return its screen."""
        assert self.stdout is not None
        screen = self.stdout.read()
        self.wait(timeout=60)
        return screen


@contextmanager
def served_by_command(model: Path, home: Path, *words: str) -> Iterator[tuple[ServeProcess, str]]:
    """Run `ferry serve` until it is ready; give its process and its address."""
    process = ServeProcess(model, home, "--port", "0", *words)
    try:
        url = process.said.wait_for("listening on").split("listening on ")[1].split(";")[0]
        process.said.wait_for("ready after")
        yield process, url
    finally:
        process.kill()
        process.wait()
