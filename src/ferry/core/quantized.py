"""The one integer form of a quantized weight: every file format is a way to write it down.

A weight [N out, K in] becomes integers [N, K] and scales [N, G]: weight = (integers - zeros) * scales, where G is 1 for
one scale per row, K / group for groups along a row, and N = G = 1 for one scale per tensor. Scales are rounded to the
dtype they are stored in before anything is divided by them, so that what is stored is what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.core.floats import Float32, from_float32, to_float32

Bits = Literal[8, 4]
Activations = Literal["token", "tensor", ""]
Int8 = npt.NDArray[np.int8]
PER_ROW, PER_TENSOR = 0, -1
BOTH_16 = "BF16+F16"
INT4_MIDDLE = 8
"""The zero point of a symmetric 4-bit weight: its integers are 0 to 15."""
ROUND_ITEMS = 1 << 18
"""Weights that are rounded at once: 1 MB of float32."""


class Scheme(NamedTuple):
    """How the numbers of a linear layer are held.

    `group` is the number of neighbouring items of a row that share a scale: PER_ROW, PER_TENSOR, or 32, 64, 128.
    `activations` are int8 with one dynamic scale per token, one static scale per tensor, or ("") not quantized.
    """

    bits: Bits
    group: int
    symmetric: bool
    activations: Activations

    @property
    def name(self) -> str:
        """Return W8A8, W8A16 or W4A16."""
        return f"W{self.bits}A{8 if self.activations else 16}"

    def scales_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Return the shape of the scales of a weight [rows, cols]."""
        if self.group == PER_TENSOR:
            return (1, 1)
        return (rows, cols // self.group if self.group else 1)


@dataclass(frozen=True)
class Integers:
    """A quantized weight.

    `values` [N, K] are -127 to 127 (8 bits) or 0 to 15 (4 bits); `scales` [N, G] float32 that `scale_dtype` holds
    exactly; `zeros` [N, G] 0 to 15, for 4 bits only. `input_scale` is the static scale of the activations, if any.
    """

    scheme: Scheme
    values: Int8
    scales: Float32
    scale_dtype: str
    zeros: Int8 | None = None
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape


def rounded(values: Float32, dtype: str) -> Float32:
    """Return float32 values as `dtype` would hold them; BOTH_16 gives values that bfloat16 and float16 hold alike."""
    for part in dtype.split("+"):
        values = to_float32(from_float32(values, part), part)
    return values


def quantize(
    weight_NK: Float32,
    scheme: Scheme,
    scale_dtype: str,
    clip_NG: Float32 | None = None,
    input_scale: float | None = None,
) -> Integers:
    """Return a weight rounded to nearest (ties to even). `clip_NG` shrinks the range of each scale (1 = all of it).

    8 bits are symmetric. Rows are rounded a few at a time, so that all steps of one find its numbers in the cache.
    """
    assert scheme.symmetric or scheme.bits == 4, "8-bit weights are symmetric"
    rows, cols = weight_NK.shape
    num_rows, num_groups = scheme.scales_shape(rows, cols)
    values = np.empty((rows, cols), np.int8)
    scales = np.empty((num_rows, num_groups), np.float32)
    zeros = np.empty((num_rows, num_groups), np.int8) if scheme.bits == 4 else None
    step = rows if num_rows != rows else max(1, ROUND_ITEMS // cols)
    for row in range(0, rows, step):
        part = slice(row, row + step)
        own = part if num_rows == rows else slice(None)
        grouped = weight_NK[part].reshape(len(scales[own]), num_groups, -1)
        clip = np.float32(1) if clip_NG is None else clip_NG[own]
        low, high = grouped.min(axis=2), grouped.max(axis=2)
        if scheme.symmetric:
            top = np.float32(127 if scheme.bits == 8 else 7)
            scales[own] = _safe(np.maximum(high, -low) * clip / top, scale_dtype)
            bottom, middle = -top - (scheme.bits == 4), None
        else:
            low, high = np.minimum(low, 0) * clip, np.maximum(high, 0) * clip
            scales[own] = _safe((high - low) / np.float32(15), scale_dtype)
            middle = np.clip(np.rint(-low / scales[own]), 0, 15)
            bottom, top = np.float32(0), np.float32(15)
        rounded_NGK = grouped / scales[own][:, :, None]
        np.rint(rounded_NGK, out=rounded_NGK)
        if middle is not None:
            rounded_NGK += middle[:, :, None]
        np.clip(rounded_NGK, bottom, top, out=rounded_NGK)
        if zeros is not None:
            zeros[own] = INT4_MIDDLE if middle is None else middle
            rounded_NGK += INT4_MIDDLE if middle is None else 0
        values[part] = rounded_NGK.reshape(-1, cols)
    return Integers(scheme, values, scales, scale_dtype, zeros, input_scale)


def _safe(scales: Float32, dtype: str) -> Float32:
    """Return scales rounded to their dtype; 1 where all values are zero or too small for a scale of that dtype."""
    found = rounded(scales.astype(np.float32), dtype)
    found[found == 0] = 1
    return found


def dequantize(integers: Integers) -> Float32:
    """Return the weight [N, K] that the integers stand for, in float32."""
    rows, cols = integers.shape
    num_rows, num_groups = integers.scales.shape
    grouped = integers.values.reshape(num_rows, num_groups, -1).astype(np.float32)
    if integers.zeros is not None:
        grouped -= integers.zeros[:, :, None]
    grouped *= integers.scales[:, :, None]
    return grouped.reshape(rows, cols)
