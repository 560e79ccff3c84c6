"""Floating-point tensors as numpy float32 and back: bytes in, bytes out, rounded to nearest with ties to even.

numpy has no bfloat16, so a bfloat16 is the upper half of a float32 here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FLOATS = ("F32", "BF16", "F16")
"""The data types that can be computed with."""
Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
_QUIET_NAN = 0x7FC0


def to_float32(data: Bytes, dtype: str) -> Float32:
    """Return the values of contiguous bytes; the last axis shrinks by the size of an item. F32 is not copied."""
    assert dtype in FLOATS
    if dtype == "F32":
        return data.view(np.float32)
    if dtype == "F16":
        return data.view(np.float16).astype(np.float32)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def from_float32(values: Float32, dtype: str) -> Bytes:
    """Return the bytes of values, rounded once; what is too large for the dtype becomes infinite."""
    assert dtype in FLOATS
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint8)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = _QUIET_NAN
    return rounded.view(np.uint8)
