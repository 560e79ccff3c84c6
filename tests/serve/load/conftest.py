"""One small model for all tests under load, and servers of it that are gone at a test's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from load.serving import Server
from load.small_model import NAME, make_small_model

Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the small model."""
    return make_small_model(tmp_path_factory.mktemp("load") / NAME, smollm2)


@pytest.fixture
def serve(small: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start a server: `serve("--max-queue", "8")`. It may not listen yet."""
    started: list[Server] = []

    def start(*words: str, model: Path = small, cache: str = "16MB", port: int = 0) -> Server:
        started.append(Server(model, tmp_path / "home", *words, cache=cache, port=port))
        return started[-1]

    yield start
    for server in started:
        server.close()
