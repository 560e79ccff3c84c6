"""The CPU: always there, collectives by gloo."""

from __future__ import annotations

import time
from functools import cache

from ferry.core.environment import memory_bytes
from ferry.core.record import peak_rss_bytes
from ferry.devices.device import Choice, Device

SQUARE, NUM_PRODUCTS = 1024, 5
FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Flags of /proc/cpuinfo that mean bfloat16 products in hardware (the last one is ARM's)."""


def _dtype() -> Choice:
    flags = _flags()
    found = [flag for flag in FAST_BFLOAT16 if flag in flags]
    if found:
        return Choice("bfloat16", f"this CPU multiplies bfloat16 in hardware ({found[0]})")
    return Choice("float32", "this CPU has no bfloat16 products; emulated ones are about 10 times slower")


def _flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


@cache
def _flops(dtype: str) -> float | None:
    """Return the rate of the best of a few square products with this process's threads: no data sheet says it."""
    import torch

    a, b = (torch.ones(SQUARE, SQUARE, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(NUM_PRODUCTS):
        started_s = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started_s)
    return 2.0 * SQUARE**3 / min(seconds)


DEVICE = Device(
    type="cpu",
    backend="gloo",
    rank=100,
    count=lambda: 1,
    memory_bytes=lambda index: memory_bytes(),
    peak_bytes=lambda index: peak_rss_bytes(),
    dtype=_dtype,
    select=lambda index: None,
    flops=_flops,
    prepare=lambda: None,
)
