"""What this machine has to run a model on, seen without importing a framework: accelerators and free memory.

The front end asks; it never loads torch. A driver shows its devices as files, and its own program says their memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from ferry.core.environment import memory_bytes

MIB = 1 << 20
PATIENCE_S = 10
TORCH_BYTES = 400_000_000
"""What Python takes with torch and one step of a small model (measured)."""
KERNELS_BYTES = 256 << 20
"""What Ferry's own kernels need without torch: Python, the front end, the allocator (measured)."""
ROOT = Path("/")
CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class Accelerators(NamedTuple):
    """The accelerators of one make, and the memory of the smallest one: 0 where nobody says."""

    name: str
    num_devices: int
    total_bytes: int = 0
    free_bytes: int = 0


class Place(NamedTuple):
    """Where a model is put: the memory of one device."""

    name: str
    """In words, as `this machine`."""
    total_bytes: int
    """0 where nobody knows."""
    free_bytes: int
    default_share: float | None
    """Share of it that an engine takes by itself; None: as much as it needs."""
    reserve_bytes: int
    """What an engine takes besides weights and cache."""
    on_cpu: bool = True
    unpacks: bool = True
    """Whether 4-bit weights become floats there, as in Ferry's own engine."""


def machine(reserve_bytes: int = TORCH_BYTES, *, unpacks: bool = True) -> Place:
    """Return the memory of this machine, or of the container it is seen from."""
    return Place("this machine", total_memory_bytes(), free_memory_bytes(), None, reserve_bytes, unpacks=unpacks)


def nvidia(dev: Path = Path("/dev")) -> Accelerators:
    """Return NVIDIA's, by the files of their driver."""
    number = sum(path.name.removeprefix("nvidia").isdigit() for path in dev.glob("nvidia[0-9]*"))
    return Accelerators("NVIDIA GPU", number, *(_nvidia_memory() if number else ()))


def ascend(dev: Path = Path("/dev")) -> Accelerators:
    """Return Ascend NPUs, by the files of their driver."""
    number = sum(path.name.removeprefix("davinci").isdigit() for path in dev.glob("davinci[0-9]*"))
    return Accelerators("Ascend NPU", number)


def free_memory_bytes(root: Path = ROOT) -> int:
    """Return the memory that can be had without swapping, within what a container is given."""
    path = root / "proc/meminfo"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "")
    free = int(found) * 1024 if found else memory_bytes()
    return min([free, *(max(0, limit - used) for limit, used in _limits(root))])


def total_memory_bytes(root: Path = ROOT) -> int:
    """Return the memory of the machine, or of the container."""
    return min([memory_bytes(), *(limit for limit, _ in _limits(root))])


def _limits(root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) of the control groups this process is in and those around them, of both versions."""
    own = root / "proc/self/cgroup"
    lines = [line.split(":", 2) for line in (own.read_text().splitlines() if own.exists() else [])]
    groups = {Path(line[2].strip("/")) for line in lines if line[1] in ("", "memory")} | {Path()}
    found = []
    for group in {around for each in groups for around in (each, *each.parents)}:
        for tree, limit_name, used_name in CGROUPS:
            limit, used = _number(root / tree / group / limit_name), _number(root / tree / group / used_name)
            if limit is not None and used is not None:
                found.append((limit, used))
    return found


def _number(path: Path) -> int | None:
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _nvidia_memory() -> tuple[int, int]:
    """Return (total, free) of the smallest GPU, as its driver's program says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0, 0
    command = [program, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    rows = [[int(word) * MIB for word in re.findall(r"\d+", line)] for line in done.stdout.splitlines()]
    total, free = min((row for row in rows if len(row) == 2), default=[0, 0])
    return total, free
