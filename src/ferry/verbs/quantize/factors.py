"""Smoothing factors: from statistics to numbers, settled so that they fold without rounding, and folded into a layer.

Sources: SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, eq. 4), AWQ (Lin et al. 2023, arXiv 2306.00978, sec. 3.2).
"""

from __future__ import annotations

import math

import torch

from ferry.core.errors import InputError, IntegrityError
from ferry.core.family import Model
from ferry.core.smoothing import Group
from ferry.engines.blocks import Layer
from ferry.verbs.quantize.numerics import rounded

SMALLEST = 1e-5
TOLERANCE = 1e-8
"""Of the self-check, as NMSE: float32 arithmetic in another order gives about 1e-13."""


def smoothquant(input_absmax: torch.Tensor, weight_absmax: torch.Tensor, strength: float) -> torch.Tensor:
    """Return max|X|^a / max|W|^(1-a) per channel."""
    return _balanced(
        input_absmax.clamp(min=SMALLEST).pow(strength) / weight_absmax.clamp(min=SMALLEST).pow(1 - strength)
    )


def awq(input_mean: torch.Tensor, weight_mean: torch.Tensor, ratio: float, *, duo: bool) -> torch.Tensor:
    """Return mean|X|^r, divided by (mean |W| relative to its group)^(1-r) where `duo` asks for it."""
    found = input_mean.clamp(min=SMALLEST).pow(ratio)
    return _balanced(found / (weight_mean.pow(1 - ratio) + 1e-4) if duo else found)


def _balanced(factors: torch.Tensor) -> torch.Tensor:
    """Return factors around 1: a common factor changes nothing but the range of what is stored."""
    factors = factors.clamp(min=SMALLEST)
    return factors / (factors.max() * factors.min()).sqrt()


def over_heads(x_K: torch.Tensor, group: Group, *, mean: bool) -> torch.Tensor:
    """Return statistics of input channels as statistics of factors: query heads of one key-value head together."""
    if group.repeats == 1:
        return x_K
    x = x_K.reshape(-1, group.repeats, group.head_dim)
    return (x.mean(dim=1) if mean else x.amax(dim=1)).reshape(-1)


def over_columns(factors: torch.Tensor, group: Group) -> torch.Tensor:
    """Return one factor per input channel of the linears."""
    if group.repeats == 1:
        return factors
    return factors.reshape(-1, 1, group.head_dim).expand(-1, group.repeats, -1).reshape(-1)


def settled(factors: torch.Tensor, group: Group, layer: Layer, dtype: str) -> torch.Tensor:
    """Return the factors that are really applied.

    A norm is stored in the dtype of the model. What it is divided by is corrected so that the quotient is exact there:
    then rounding it costs nothing. A router stays in that dtype too, so what it reads gets powers of two.
    """
    if group.feeds_router:
        factors = torch.exp2(torch.log2(factors).round())
    if not group.from_norm:
        return factors
    norm = layer.parameter(group.source.name)
    stored = rounded(norm / factors, dtype)
    usable = (stored != 0) & torch.isfinite(stored) & (norm != 0)
    return torch.where(usable, norm / stored, 1.0)


def fold(layer: Layer, group: Group, factors: torch.Tensor, dtype: str) -> None:
    """Divide the source by the factors and multiply the columns behind it. In place."""
    source = layer.parameter(group.source.name)
    rows = slice(group.source.row, group.source.row + group.source.rows)
    if group.from_norm:
        source[rows] = rounded(source[rows] / factors, dtype)
    else:
        source[rows] /= factors[:, None]
        if group.bias is not None:
            layer.parameter(group.bias.name)[group.bias.row : group.bias.row + group.bias.rows] /= factors
    columns = over_columns(factors, group)
    for part in group.into:
        layer.parameter(part.name)[part.row : part.row + part.rows] *= columns


def check_smoothed(error: float, layer: Layer, model: Model) -> None:
    """Refuse a layer whose output changed by smoothing alone (NMSE): what is folded must be the same function."""
    if not math.isfinite(error):
        raise InputError(
            f"the output of layer {layer.index} is not finite on this text: a weight of it is NaN or infinite",
            code="quantize.not-finite",
            repair="is the model whole? `ferry verify` tells; is its dtype wide enough? `ferry inspect` tells",
        )
    if error > TOLERANCE:
        raise IntegrityError(
            f"layer {layer.index} is not the same after smoothing (NMSE {error:.1e}): the smoothing graph of the "
            f"{model.family.name} family is wrong",
            code="quantize.self-check",
            repair="nothing was quantized; --method rtn does not smooth",
        )
