"""What a micro-batch tells the modules that compute it: the step, and which token of the data set each position is.

Dropout masks are a hash of (seed, step, module, sample, position, channel) and not a stream of random numbers. So a
mask does not depend on the layout, on packing or on what was computed before; a resumed run draws the same masks with
no state to save, and activation checkpointing recomputes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class MicroContext:
    """Set before a forward pass, read by adapters. One per worker."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.token_ids_T: torch.Tensor | None = None

    def enter(self, step: int, token_ids_T: torch.Tensor) -> None:
        """Say which step and which tokens the next forward pass computes."""
        self.step, self.token_ids_T = step, token_ids_T

    def for_checkpoint(self) -> tuple[Any, Any]:
        """Return the contexts torch.utils.checkpoint runs forward and recomputation in."""
        return contextlib.nullcontext(), self._again(self.step, self.token_ids_T)

    @contextlib.contextmanager
    def _again(self, step: int, token_ids_T: torch.Tensor | None) -> Iterator[None]:
        now = (self.step, self.token_ids_T)
        self.step, self.token_ids_T = step, token_ids_T
        try:
            yield
        finally:
            self.step, self.token_ids_T = now


_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Of splitmix64 (Steele, Lea and Flood 2014)."""


def keep_mask(context: MicroContext, module: int, columns: range, rate: float) -> torch.Tensor:
    """Return [T, columns] booleans that are false with probability `rate`, the same on every layout."""
    assert context.token_ids_T is not None, "a forward pass outside a micro-batch"
    key = _mix(
        torch.tensor(context.seed * 1_000_003 + context.step, dtype=torch.int64) + _signed(module * _MULTIPLIERS[0])
    )
    rows_T = _mix(context.token_ids_T.to(torch.int64) + key.to(context.token_ids_T.device))
    cols_C = torch.arange(columns.start, columns.stop, device=rows_T.device, dtype=torch.int64) * _signed(
        _MULTIPLIERS[0]
    )
    hashed = _mix(rows_T[:, None] + cols_C[None, :])
    return (hashed & 0x7FFFFFFF) >= int(rate * 0x80000000)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Return the finaliser of splitmix64, in wrapping 64-bit arithmetic."""
    x = (x ^ _shifted(x, 30)) * _signed(_MULTIPLIERS[1])
    x = (x ^ _shifted(x, 27)) * _signed(_MULTIPLIERS[2])
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return an unsigned shift to the right: torch's is signed."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
