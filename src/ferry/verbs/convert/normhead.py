"""NormHead, applied once: each row of the head divided by its Euclidean length.

Baichuan 2 does this at every forward pass (`torch.nn.functional.normalize`, epsilon 1e-12). Megatron has no such step,
so the rows are normalised on the way there. Computed in float32 and rounded once, to nearest even.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferry.core.errors import InputError

EPSILON = 1e-12


def normalise_rows(window: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.uint8]:
    """Return rows of unit length: (rows, row bytes) of BF16, F16 or F32 -> the same shape and dtype."""
    values = _to_float32(np.ascontiguousarray(window), dtype)
    lengths = np.sqrt(np.sum(values * values, axis=1, keepdims=True, dtype=np.float32))
    return _from_float32(values / np.maximum(lengths, np.float32(EPSILON)), dtype)


def _to_float32(window: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "F32":
        return window.view(np.float32)
    if dtype == "F16":
        return window.view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (window.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    raise InputError(f"NormHead needs a head of F32, F16 or BF16, found {dtype}", code="normhead.dtype")


def _from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    if dtype == "F32":
        return np.ascontiguousarray(values, np.float32).view(np.uint8)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint8)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8)
