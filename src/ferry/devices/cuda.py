"""NVIDIA (and AMD, which torch calls by the same name): collectives by NCCL. Not run on such a machine yet."""

from __future__ import annotations

from ferry.devices.device import Choice, Device

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H800": 989e12, "A800": 312e12, "L40": 181e12, "4090": 165e12}
"""Dense bfloat16 rates from NVIDIA's data sheets, by a word of the device's name."""


def _count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dtype() -> Choice:
    import torch

    major, minor = torch.cuda.get_device_capability()
    if major >= 8:
        return Choice("bfloat16", f"compute capability {major}.{minor} multiplies bfloat16 in hardware")
    return Choice("float32", f"compute capability {major}.{minor} has no bfloat16 products")


def _memory_bytes(index: int) -> int:
    import torch

    return int(torch.cuda.get_device_properties(index).total_memory)


def _peak_bytes(index: int) -> int:
    import torch

    return torch.cuda.max_memory_allocated(index)


def _select(index: int) -> None:
    import torch

    torch.cuda.set_device(index)


def _flops(dtype: str) -> float | None:
    import torch

    if dtype != "bfloat16":
        return None

    name = torch.cuda.get_device_name()
    return next((rate for word, rate in PEAK_FLOPS.items() if word in name), None)


DEVICE = Device(
    type="cuda",
    backend="nccl",
    rank=10,
    count=_count,
    memory_bytes=_memory_bytes,
    peak_bytes=_peak_bytes,
    dtype=_dtype,
    select=_select,
    flops=_flops,
    prepare=lambda: None,
)
