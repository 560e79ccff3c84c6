"""What integers do to weights and activations, in torch: the same numbers as `ferry.core.quantized`, for searching."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ferry.core.quantized import INT4_MIDDLE, PER_TENSOR, Scheme
from ferry.engines.modules import TORCH_DTYPES

ITEMS = 1 << 18
"""How many items are compared in float64 at once."""


def rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return float32 values as `dtype` would hold them (as `core.quantized.rounded`)."""
    for part in dtype.split("+"):
        x = x.to(TORCH_DTYPES[part]).to(torch.float32)
    return x


def _scales(scales: torch.Tensor, dtype: str) -> torch.Tensor:
    found = rounded(scales, dtype)
    return torch.where(found == 0, 1.0, found)


def quantized_weight(
    w_NK: torch.Tensor, scheme: Scheme, scale_dtype: str, clip_NG: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the float32 weight [N, K] that the integers of a weight stand for."""
    num_rows, num_groups = scheme.scales_shape(*w_NK.shape)
    grouped = w_NK.reshape(num_rows, num_groups, -1)
    clip: torch.Tensor | float = 1.0 if clip_NG is None else clip_NG
    if scheme.symmetric:
        top = 127.0 if scheme.bits == 8 else INT4_MIDDLE - 1.0
        largest = torch.maximum(grouped.amax(dim=2), -grouped.amin(dim=2))
        scales = _scales(largest * clip / top, scale_dtype)[:, :, None]
        low = -top - (scheme.bits == 4)
        found = (grouped / scales).round_().clamp_(low, top).mul_(scales)
        return found.reshape(w_NK.shape)
    low_NG = grouped.amin(dim=2).clamp_(max=0) * clip
    high_NG = grouped.amax(dim=2).clamp_(min=0) * clip
    scales_NG = _scales((high_NG - low_NG) / 15.0, scale_dtype)
    zeros = (-low_NG / scales_NG).round_().clamp_(0, 15)[:, :, None]
    scales = scales_NG[:, :, None]
    found = (grouped / scales).round_().add_(zeros).clamp_(0, 15).sub_(zeros).mul_(scales)
    return found.reshape(w_NK.shape)


def quantized_input(x: torch.Tensor, scheme: Scheme, input_scale: float | None = None) -> torch.Tensor:
    """Return activations [..., K] as int8 with one scale per token (or one for all) would hold them."""
    if not scheme.activations:
        return x
    if scheme.activations == "tensor":
        assert input_scale is not None
        return (x / input_scale).round_().clamp_(-128, 127).mul_(input_scale)
    scales = x.abs().amax(dim=-1, keepdim=True).div_(127.0).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scales).round_().clamp_(-128, 127).mul_(scales)


def scale_of_range(absmax_K: torch.Tensor) -> torch.Tensor:
    """Return the one scale of activations whose channels reach these magnitudes; never 0."""
    return (absmax_K.max() / 127.0).clamp(min=torch.finfo(torch.float32).tiny)


class Distance(NamedTuple):
    """Squared error over squared norm (NMSE), and the cosine, of a tensor to the one it should be."""

    nmse: float
    cosine: float


def distance(found: torch.Tensor, wanted: torch.Tensor) -> Distance:
    """Return how far a tensor is from another one, accumulated in float64."""
    norm = own = product = error = 0.0
    flat, right = found.reshape(-1), wanted.reshape(-1)
    for start in range(0, len(flat), ITEMS):
        x, y = (tensor[start : start + ITEMS].double() for tensor in (flat, right))
        norm, own, product = norm + float(y @ y), own + float(x @ x), product + float(x @ y)
        error += float((x - y).square_().sum())
    if not norm:
        return Distance(0.0 if not own else math.inf, 1.0 if not own else 0.0)
    return Distance(error / norm, product / math.sqrt(norm * own) if own else 0.0)


def squared_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the squared error over the squared norm of what is wanted (NMSE)."""
    return distance(found, wanted).nmse


def is_per_tensor(scheme: Scheme) -> bool:
    return scheme.group == PER_TENSOR
