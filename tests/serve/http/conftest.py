"""One engine for all tests of the front end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from house import Door, House
from openai import OpenAI
from small_chat_model import make_small_chat_model


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
