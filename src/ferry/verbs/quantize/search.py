"""Searching the strength of smoothing, layer by layer: the candidate whose outputs differ least on kept rows.

The error is that of the linears behind the factors, with weights and activations as they will be held. Kept rows are
not those of the statistics, so that a strength is not chosen for the rows it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ferry.core.quantized import Scheme
from ferry.core.smoothing import Group
from ferry.engines.blocks import Layer
from ferry.verbs.quantize import factors as f
from ferry.verbs.quantize.numerics import is_per_tensor, quantized_input, quantized_weight, scale_of_range
from ferry.verbs.quantize.statistics import Seen

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
OUTPUTS = 512
"""Outputs of each linear that are compared."""
NONE = -1.0
"""The candidate of factors that are all 1."""


@dataclass(frozen=True)
class Found:
    """What was chosen for a group: its strength (or None for no smoothing), and the error of every candidate."""

    strength: float | None
    errors: dict[float, float]


@dataclass(frozen=True)
class Reader:
    """A linear behind a group of factors, with kept rows of its input [R, K] and some rows of its weight [N, K]."""

    rows: torch.Tensor
    weight: torch.Tensor


def some_outputs(rows_NK: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return about `OUTPUTS` evenly spaced rows of a weight, or of what belongs to its rows.

    Each row has its own scales, so a sample of them tells of all.
    """
    return rows_NK if is_per_tensor(scheme) else rows_NK[:: max(1, len(rows_NK) // OUTPUTS)]


def readers_of(
    group: Group, layer: Layer, seen: dict[str, Seen], shared: dict[str, str], scheme: Scheme
) -> list[Reader]:
    """Return the linears of a group for which rows were kept, with some of their outputs."""
    found = []
    for part in group.into:
        name = part.name.removesuffix(".weight")
        if name in shared and len(seen[shared[name]].rows):
            weight = layer.parameter(part.name)[part.row : part.row + part.rows]
            found.append(Reader(seen[shared[name]].rows, some_outputs(weight, scheme)))
    return found


def statistics_of(
    group: Group, layer: Layer, seen: dict[str, Seen], shared: dict[str, str], *, mean: bool
) -> torch.Tensor:
    """Return the statistics of the inputs of a group by factor: the largest magnitude, or its mean."""
    keys = {shared[name] for part in group.into if (name := part.name.removesuffix(".weight")) in shared}
    inputs = [seen[key] for key in sorted(keys) if seen[key].tokens]
    if not inputs:
        return torch.zeros(0)
    if mean:
        tokens = sum(item.tokens for item in inputs)
        found = (sum((item.total_abs for item in inputs), torch.zeros_like(inputs[0].total_abs)) / tokens).float()
    else:
        found = torch.stack([item.absmax for item in inputs]).amax(dim=0)
    return f.over_heads(found, group, mean=mean)


def weight_absmax(group: Group, layer: Layer) -> torch.Tensor:
    """Return the largest magnitude of the columns of all linears of a group, by factor."""
    tops = [
        layer.parameter(part.name)[part.row : part.row + part.rows].abs().amax(dim=0)
        for part in group.into
        if part.name.removesuffix(".weight") in layer.linears
    ]
    return f.over_heads(torch.stack(tops).amax(dim=0), group, mean=False)


def search_strength(
    group: Group, layer: Layer, readers: Sequence[Reader], input_absmax: torch.Tensor, scheme: Scheme, scale_dtype: str,
    dtype: str, candidates: Sequence[float] = STRENGTHS,
) -> Found:  # fmt: skip
    """Return the best strength for a group; behind a linear, no smoothing is a candidate as well."""
    tops = weight_absmax(group, layer)
    errors: dict[float, float] = {}
    wanted = [reader.rows @ reader.weight.T for reader in readers]
    # Behind a norm some smoothing always pays: text that was not seen has larger outliers than text that was.
    for candidate in candidates if group.from_norm else (NONE, *candidates):
        factors = torch.ones_like(tops) if candidate == NONE else f.smoothquant(input_absmax, tops, candidate)
        columns = f.over_columns(f.settled(factors, group, layer, dtype), group)
        scale = float(scale_of_range(input_absmax / factors)) if scheme.activations == "tensor" else None
        errors[candidate] = _error(readers, wanted, columns, scheme, scale_dtype, scale)
    best = min(errors, key=lambda candidate: (errors[candidate], candidate))
    return Found(None if best == NONE else best, errors)


def _error(
    readers: Sequence[Reader], wanted: Sequence[torch.Tensor], columns: torch.Tensor, scheme: Scheme, dtype: str,
    input_scale: float | None,
) -> float:  # fmt: skip
    """Return the mean NMSE of the outputs of some linears."""
    total = 0.0
    smoothed: dict[int, torch.Tensor] = {}
    for reader, output in zip(readers, wanted, strict=True):
        key = id(reader.rows)
        if key not in smoothed:
            smoothed[key] = quantized_input(reader.rows / columns, scheme, input_scale)
        found = smoothed[key] @ quantized_weight(reader.weight * columns, scheme, dtype).T
        norm = float(output.square().sum())
        total += float(found.sub_(output).square_().sum()) / norm if norm else 0.0
    return total / max(1, len(readers))
