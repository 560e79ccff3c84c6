"""One engine for all tests of the front end, and doors to it: servers on free ports with settings of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import pytest
from openai import OpenAI
from small_chat_model import make_small_chat_model

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


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small model."""
    return make_small_chat_model(tmp_path_factory.mktemp("served") / "small")


@pytest.fixture(scope="session")
def house(small_model: Path) -> Iterator[House]:
    """The engine, and a way to open servers before it."""
    made = House(small_model)
    yield made
    made.close()


@pytest.fixture(scope="session")
def door(house: House) -> Door:
    """A server with usual settings."""
    return house.open()


@pytest.fixture(scope="session")
def openai_client(door: Door) -> OpenAI:
    """The client of OpenAI, which is the judge of every shape."""
    return OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait until a condition holds, and no longer."""

    def wait(condition: Callable[[], bool]) -> None:
        seen = threading.Event()
        for _ in range(2000):
            if condition():
                return
            seen.wait(0.005)
        raise AssertionError("it never came true")

    return wait
