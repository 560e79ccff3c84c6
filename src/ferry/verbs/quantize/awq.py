"""AWQ for 4-bit weights: factors by a grid over ratios, then ranges by a grid over shrinking (arXiv 2306.00978).

Activations stay as they are, so the error of a weight is a quadratic form of its change: kept rows [R, K] count only by
their Gram matrix, and more rows than channels are replaced by a triangle with the same Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ferry.core.quantized import Scheme
from ferry.core.smoothing import Group
from ferry.engines.blocks import Layer
from ferry.verbs.quantize import factors as f
from ferry.verbs.quantize.numerics import quantized_weight
from ferry.verbs.quantize.search import Reader

RATIOS = tuple(step / 20 for step in range(20))
SHRINKS = tuple(1 - step / 20 for step in range(1, 11))
"""What is tried of a range besides all of it: down to half, as the paper's code does."""
CHUNK_ITEMS = 1 << 22


@dataclass(frozen=True)
class Ratio:
    """What was chosen for a group: ratio, whether weights count (duo), and the error of it and of no factors."""

    ratio: float
    duo: bool
    error: float
    error_without: float


def triangle(rows_RK: torch.Tensor) -> torch.Tensor:
    """Return [min(R, K), K] rows with the same Gram matrix."""
    if rows_RK.shape[0] <= rows_RK.shape[1]:
        return rows_RK
    found: torch.Tensor = torch.linalg.qr(rows_RK, mode="r").R
    return found


def weight_mean(group: Group, layer: Layer, scheme: Scheme) -> torch.Tensor:
    """Return the mean of |W| relative to the largest of its group of items, by factor."""
    means, rows = torch.zeros(0), 0
    for part in group.into:
        if part.name.removesuffix(".weight") not in layer.linears:
            continue
        weight = layer.parameter(part.name)[part.row : part.row + part.rows].abs()
        grouped = weight.reshape(weight.shape[0], -1, scheme.group)
        relative = (grouped / grouped.amax(dim=2, keepdim=True).clamp(min=1e-6)).reshape(weight.shape)
        means = relative.sum(dim=0) if not rows else means + relative.sum(dim=0)
        rows += weight.shape[0]
    return f.over_heads(means / rows, group, mean=True)


def search_ratio(
    group: Group, layer: Layer, readers: Sequence[Reader], input_mean: torch.Tensor, scheme: Scheme,
    scale_dtype: str, dtype: str,
) -> Ratio:  # fmt: skip
    """Return the best ratio for a group: the candidate that changes the outputs of its linears least."""
    means = weight_mean(group, layer, scheme)
    triangles = {id(reader.rows): triangle(reader.rows) for reader in readers}
    norms = [float((triangles[id(reader.rows)] @ reader.weight.T).square().sum()) for reader in readers]
    best = Ratio(0.0, False, float("inf"), 0.0)
    without = float("inf")
    for duo in (True, False):
        for ratio in RATIOS:
            factors = f.awq(input_mean, means, ratio, duo=duo)
            columns = f.over_columns(f.settled(factors, group, layer, dtype), group)
            error = 0.0
            for reader, norm in zip(readers, norms, strict=True):
                change = quantized_weight(reader.weight * columns, scheme, scale_dtype) / columns - reader.weight
                error += float((triangles[id(reader.rows)] @ change.T).square().sum()) / norm if norm else 0.0
            error /= max(1, len(readers))
            if not (duo or ratio):
                without = error
            if error < best.error:
                best = Ratio(ratio, duo, error, without)
    # What no factors cost is known only after the candidates that count weights.
    return replace(best, error_without=without)


def search_clip(weight_NK: torch.Tensor, rows_RK: torch.Tensor, scheme: Scheme, dtype: str) -> torch.Tensor:
    """Return the share of its range [N, G] that each scale should cover: the least change of its part of the output.

    `rows_RK` are inputs of the (smoothed) weight.
    """
    num_rows, num_groups = scheme.scales_shape(*weight_NK.shape)
    size = weight_NK.shape[1] // num_groups
    grams = torch.einsum("rgk,rgl->gkl", *[rows_RK.reshape(len(rows_RK), num_groups, size)] * 2)
    best = torch.ones(num_rows, num_groups)
    step = max(1, CHUNK_ITEMS // weight_NK.shape[1])
    for start in range(0, num_rows, step):
        part = weight_NK[start : start + step]
        chosen = best[start : start + step]
        least = _errors(part, chosen, scheme, dtype, grams)
        for shrink in SHRINKS:
            clip = torch.full_like(chosen, shrink)
            errors = _errors(part, clip, scheme, dtype, grams)
            better = errors < least
            chosen[better] = shrink
            least = torch.where(better, errors, least)
    return best


def _errors(
    weight: torch.Tensor, clip: torch.Tensor, scheme: Scheme, dtype: str, grams_GKK: torch.Tensor
) -> torch.Tensor:
    """Return the squared change of the output of each row and group [N, G]."""
    change = (quantized_weight(weight, scheme, dtype, clip) - weight).reshape(*clip.shape, -1).transpose(0, 1)
    return (torch.bmm(change, grams_GKK) * change).sum(dim=2).T
