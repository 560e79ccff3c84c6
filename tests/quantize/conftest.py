"""Models and text that all tests of quantization read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quantize.making import KINDS, write_model, write_text


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantizing")


@pytest.fixture(scope="session")
def model(place: Path) -> Callable[[str], Path]:
    """Tiny models by name. Read them, never write into them: take a copy."""

    def get(name: str) -> Path:
        kind, fields = KINDS[name]
        directory = place / name
        return directory if directory.exists() else write_model(kind, directory, **fields)

    return get


@pytest.fixture(scope="session")
def text(place: Path) -> Path:
    return write_text(place / "text.jsonl")
