"""What an accelerator is to the rest of Ferry: a frozen value with a few functions. New accelerators are new files.

Nothing outside this folder names an accelerator. `found()` says which one this machine has; asking imports torch, so it
is asked only where torch is needed anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ferry.core.errors import UnavailableError, did_you_mean


class Choice(NamedTuple):
    """A data type chosen for the hardware, and why."""

    dtype: str
    reason: str


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    `type` is torch's name of it, `backend` the collective library, `rank` the order in which devices are looked for.
    `count()` is the number here (0 = none), `memory_bytes(index)` the size of one, `peak_bytes(index)` what this
    process has used at most, `dtype()` the type to compute in and why, `flops(dtype)` its peak rate or None if
    unknown, `select(index)` makes one the current device and `prepare()` imports what torch needs to know this kind.
    """

    type: str
    backend: str
    rank: int
    count: Callable[[], int]
    memory_bytes: Callable[[int], int]
    peak_bytes: Callable[[int], int]
    dtype: Callable[[], Choice]
    select: Callable[[int], None]
    flops: Callable[[str], float | None]
    prepare: Callable[[], None]


def devices() -> dict[str, Device]:
    """Return every kind of device by name, the preferred one first."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "device"))
    found = {name: import_module(f"ferry.devices.{name}").DEVICE for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1].rank))


def find(name: str = "auto") -> Device:
    """Return the device of this name, or with `auto` the first kind that this machine has."""
    known = devices()
    if name == "auto":
        return next(device for device in known.values() if device.count())
    if name not in known:
        raise UnavailableError(f"no device {name!r}{did_you_mean(name, list(known))}", code="device.unknown")
    if not known[name].count():
        raise UnavailableError(
            f"this machine has no usable device {name!r}",
            code="device.missing",
            repair="install the torch build for it (README), or use --device auto",
        )
    return known[name]
