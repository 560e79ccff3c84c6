"""What all tests share: a home of their own, and one real model.

The model is always made from the PyPI wheel, never from the hub, so that its bytes are the same on every machine. It is
kept between test runs in $FERRY_TEST_CACHE (default: `.cache` in the repository, which ignores itself).
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from surroundings import REPOSITORY, SMOLLM2_SHA256, without_hub

if TYPE_CHECKING:
    from models import Shelf


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep run records and caches of tests out of the user's home."""
    monkeypatch.setenv("FERRY_HOME", str(tmp_path_factory.mktemp("ferry-home")))


@pytest.fixture(scope="session")
def test_cache() -> Path:
    """A directory that outlives the test run."""
    cache = Path(os.environ.get("FERRY_TEST_CACHE") or REPOSITORY / ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    return cache


@pytest.fixture(scope="session")
def smollm2(test_cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory with a manifest. Read it, never write into it."""
    target = test_cache / "smollm2-135m-instruct"
    with _alone(test_cache / "smollm2.lock"):
        pull = (
            "import ferry, sys; print(ferry.pull(source='smollm2-135m-instruct', output=sys.argv[1])['model_sha256'])"
        )
        done = subprocess.run(
            [sys.executable, "-c", pull, str(target)],
            env=without_hub(os.environ) | {"FERRY_HOME": str(test_cache / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == SMOLLM2_SHA256, f"remove {target}: it was made by an older version"
    return target


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2: Path, test_cache: Path) -> Path:
    """The GGUF file that `smollm2` was made from."""
    (path,) = (test_cache / "home" / "cache" / "gguf").glob("*/*.gguf")
    return path


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one test process at a time do something."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Small random models of every family by name: `models("qwen2-tied")`. Read them, never write into them."""
    from models import Shelf

    return Shelf(tmp_path_factory.mktemp("models"))
