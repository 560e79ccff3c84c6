"""The conditions a run took place in: machine, versions, settings. Kept with every run, because a number without its
conditions cannot be compared. Nothing heavy is imported to learn a version, and no secret is written down."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

from ferry import __version__

PACKAGES = (
    "numpy",
    "pydantic",
    "pyyaml",
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "megatron-core",
)
_SETTINGS = re.compile(r"^(FERRY|HF|OMP|MKL|TORCH|PYTORCH|NCCL|HCCL|GLOO|CUDA|ASCEND|SLURM)_|^(RANK|WORLD_SIZE|LANG)$")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def environment() -> dict[str, Any]:
    """Return the conditions of this process as JSON values."""
    return {
        "ferry": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "packages": _versions(),
        "variables": settings(os.environ),
    }


def hardware() -> dict[str, Any]:
    """Return what a result was made on, without anything that names the machine or its user."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "num_cores": usable_cores(),
        "memory_bytes": memory_bytes(),
    }


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change results or speed; of secrets only that they are set."""
    return {
        name: "(set, not recorded)" if _SECRET.search(name) else value
        for name, value in sorted(environ.items())
        if _SETTINGS.search(name)
    }


def usable_cores() -> int:
    """Return the cores this process may use, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the size of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
