"""Ascend NPUs through torch_npu: collectives by HCCL. Not run on such a machine yet."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ferry.devices.device import Choice, Device

PEAK_FLOPS = {"910B": 313e12}
"""Dense half-precision rate by a word of the device's name; published figures vary by model."""


def _npu() -> Any:
    """Return torch's module for NPUs, which importing torch_npu adds."""
    import torch

    _prepare()
    return getattr(torch, "npu", None)


def _prepare() -> None:
    from importlib import import_module

    if find_spec("torch_npu") is not None:
        import_module("torch_npu")


def _count() -> int:
    npu = _npu() if find_spec("torch_npu") is not None else None
    return int(npu.device_count()) if npu is not None and npu.is_available() else 0


def _flops(dtype: str) -> float | None:
    if dtype != "bfloat16":
        return None
    name = str(_npu().get_device_name(0))
    return next((rate for word, rate in PEAK_FLOPS.items() if word in name), None)


DEVICE = Device(
    type="npu",
    backend="hccl",
    rank=20,
    count=_count,
    memory_bytes=lambda index: int(_npu().get_device_properties(index).total_memory),
    peak_bytes=lambda index: int(_npu().max_memory_allocated(index)),
    dtype=lambda: Choice("bfloat16", "Ascend 910B multiplies bfloat16 in hardware"),
    select=lambda index: _npu().set_device(index),
    flops=_flops,
    prepare=_prepare,
)
