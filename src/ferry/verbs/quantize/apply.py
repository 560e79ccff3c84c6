"""Pass 2, one block: smooth it, quantize it, and see what that does to held-out text on its way through the model.

Two streams of hidden states run side by side: one through the original blocks, one through the quantized ones, whose
activations are quantized as an engine would. What is measured is the arithmetic of the stored numbers, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ferry.core.dtypes import num_bytes
from ferry.core.floats import from_float32
from ferry.core.quantized import Integers, Scheme, dequantize, quantize
from ferry.core.smoothing import Group, groups, layer_tensors
from ferry.engines.blocks import Blocks, Layer
from ferry.formats.quantized_format import Format
from ferry.verbs.quantize import factors as f
from ferry.verbs.quantize.numerics import distance, quantized_input, rounded, scale_of_range, squared_error
from ferry.verbs.quantize.scales import LayerScales, clip_of_steps
from ferry.verbs.quantize.search import weight_absmax
from ferry.verbs.quantize.shards import Piece
from ferry.verbs.quantize.statistics import Seen, shared_inputs, watch

ROWS = 256
"""Rows of held-out input on which each linear is compared by itself."""
WEIGHT = ".weight"


@dataclass(frozen=True)
class Target:
    """What a model is made into. `floats` are the modules that stay float, and why."""

    scheme: Scheme
    format: Format
    scale_dtype: str
    floats: dict[str, str] = field(default_factory=dict)
    strength: float | None = None
    """Where given, factors are made anew with it from the ranges in the scales."""


@dataclass
class Streams:
    """Held-out hidden states [B, T, H] behind the last block: of the original, and of the result."""

    original: torch.Tensor
    quantized: torch.Tensor


@dataclass(frozen=True)
class Made:
    """A block in its new form: the tensors to be stored, and its line of the proof."""

    pieces: list[Piece]
    facts: dict[str, Any]


def apply_layer(
    blocks: Blocks, layer: Layer, scales: LayerScales | None, target: Target, streams: Streams | None
) -> Made:
    """Return a block quantized; the streams move on behind it. The layer is not to be used afterwards."""
    edges = groups(blocks.model, layer.index)
    shared = shared_inputs(layer, edges)
    seen: dict[str, Seen] = {}
    before = None
    if streams is not None:
        before = streams.original[:1].clone()
        seen = _original_stream(blocks, layer, shared, streams)
    applied = _smooth(blocks, layer, edges, scales, target)
    check = None
    if streams is not None and before is not None:
        check = squared_error(blocks.run(layer, before), streams.original[:1])
        f.check_smoothed(check, layer, blocks.model)
    _round_floats(layer, blocks)
    columns = {
        part.name.removesuffix(WEIGHT): f.over_columns(factors, group)
        for group, factors in applied
        for part in group.into
    }
    kinds = {part.name.removesuffix(WEIGHT): group for group in edges for part in group.into}
    pieces: dict[str, list[Piece]] = {}
    facts = []
    hooks: list[Callable[[], None]] = []
    for name, linear in layer.linears.items():
        has_rows = bool(seen) and seen[shared[name]].tokens > 0
        rows = seen[shared[name]].rows if has_rows else torch.zeros(0, linear.weight.shape[1])
        rows = rows / columns[name] if name in columns else rows
        input_scale = _input_scale(name, kinds.get(name), columns.get(name), scales, target)
        dtype = blocks.sources.dtype(name + WEIGHT)
        made, line = _linear(name, linear.weight.data, rows, scales, target, dtype, input_scale)
        pieces[name + WEIGHT] = made
        group = kinds.get(name)
        strength = scales.facts["groups"].get(group.key, {}).get("strength") if scales and group else None
        strength = target.strength if target.strength is not None and name in columns else strength
        facts.append({**line, "group": group.kind if group else "", "strength": strength})
        if streams is not None and line["scheme"] != "float" and target.scheme.activations:
            hooks.append(_quantize_inputs(linear, target.scheme, input_scale))
    line = {
        "layer": layer.index,
        "nmse": None,
        "cosine": None,
        "self_check_nmse": check,
        "factors": len(applied),
        "linears": facts,
    }
    if streams is not None:
        for window in range(len(streams.quantized)):
            streams.quantized[window] = blocks.run(layer, streams.quantized[window : window + 1])[0]
        found = distance(streams.quantized, streams.original)
        line |= {"nmse": found.nmse, "cosine": found.cosine}
    for remove in hooks:
        remove()
    stored = [
        piece
        for name, part in layer_tensors(blocks.model, layer.index).items()
        for piece in pieces.get(name) or [_float_piece(name, layer.parameter(name), part.ndim, blocks)]
    ]
    return Made(stored, line)


def _original_stream(blocks: Blocks, layer: Layer, shared: dict[str, str], streams: Streams) -> dict[str, Seen]:
    num_windows, length = streams.original.shape[:2]
    seen = watch(layer, shared, max(1, num_windows * length // ROWS), ROWS, sums=False)
    watches: dict[str, Callable[[torch.Tensor], None]] = {name: item.see for name, item in seen.items()}
    for item in seen.values():
        item.keeps = True
    with layer.watched(watches):
        for window in range(num_windows):
            streams.original[window] = blocks.run(layer, streams.original[window : window + 1])[0]
    return seen


def _smooth(
    blocks: Blocks, layer: Layer, edges: list[Group], scales: LayerScales | None, target: Target
) -> list[tuple[Group, torch.Tensor]]:
    """Fold the factors of all groups of which something is quantized; return them."""
    applied = []
    for group in edges:
        modules = [part.name.removesuffix(WEIGHT) for part in group.into]
        dtype = blocks.sources.dtype(group.source.name)
        factors = _factors(group, layer, scales, target, dtype)
        if factors is not None and any(name in layer.linears and name not in target.floats for name in modules):
            f.fold(layer, group, factors, dtype)
            applied.append((group, factors))
    return applied


def _factors(group: Group, layer: Layer, scales: LayerScales | None, target: Target, dtype: str) -> torch.Tensor | None:
    """Return the factors of the scales, or such of another strength."""
    arrays = scales.arrays if scales else {}
    key = f"{group.key}.factors" if target.strength is None else f"{group.key}.input_absmax"
    if key not in arrays:
        return None
    found = torch.from_numpy(arrays[key])
    if target.strength is None:
        return found
    return f.settled(f.smoothquant(found, weight_absmax(group, layer), target.strength), group, layer, dtype)


def _input_scale(
    name: str, group: Group | None, columns: torch.Tensor | None, scales: LayerScales | None, target: Target
) -> float | None:
    """Return the static scale of a linear's input, if it has one."""
    arrays = scales.arrays if scales else {}
    if target.strength is not None and group is not None and columns is not None and f"{name}.input_scale" in arrays:
        absmax = f.over_columns(torch.from_numpy(arrays[f"{group.key}.input_absmax"]), group)
        return float(scale_of_range(absmax / columns))
    return float(arrays[f"{name}.input_scale"][0]) if f"{name}.input_scale" in arrays else None


def _round_floats(layer: Layer, blocks: Blocks) -> None:
    """Round what stays float to the dtype it is stored in, so that the quantized stream sees what an engine will."""
    for name in layer.others:
        value = layer.parameter(name)
        value.copy_(rounded(value, blocks.sources.dtype(name)))
    for name, linear in layer.linears.items():
        if linear.bias is not None:
            linear.bias.data.copy_(rounded(linear.bias.data, blocks.sources.dtype(f"{name}.bias")))


def _linear(
    name: str, weight: torch.Tensor, rows: torch.Tensor, scales: LayerScales | None, target: Target, dtype: str,
    input_scale: float | None,
) -> tuple[list[Piece], dict[str, Any]]:  # fmt: skip
    """Quantize one weight in place of itself; return its tensors, and its line of the proof."""
    arrays = scales.arrays if scales else {}
    reason = target.floats.get(name, "")
    wanted = rows @ weight.T
    original = weight.clone()
    if reason:
        stored = from_float32(weight.numpy(), dtype)
        weight.copy_(rounded(weight, dtype))
        pieces = [Piece(name + WEIGHT, dtype, tuple(weight.shape), [stored])]
        found, scheme = rows @ weight.T, "float"
    else:
        steps = arrays.get(f"{name}.clip")
        clip_NG = None if steps is None else clip_of_steps(steps)
        integers = quantize(weight.numpy(), target.scheme, target.scale_dtype, clip_NG, input_scale)
        pieces = pieces_of(name, integers, target.format)
        weight.copy_(torch.from_numpy(dequantize(integers)))
        found, scheme = quantized_input(rows, target.scheme, input_scale) @ weight.T, target.scheme.name
    own = distance(found, wanted) if len(rows) else None
    line = {
        "name": name,
        "scheme": scheme,
        "nmse": own.nmse if own else None,
        "cosine": own.cosine if own else None,
        "weight_nmse": squared_error(weight, original),
        "reason": reason,
    }
    return pieces, line


def pieces_of(name: str, integers: Integers, format: Format) -> list[Piece]:
    """Return the tensors that a format stores a linear as."""
    return [Piece(key, item.dtype, item.shape, [item.data]) for key, item in format.encode(name, integers).items()]


def _float_piece(name: str, value: torch.Tensor, ndim: int, blocks: Blocks) -> Piece:
    dtype = blocks.sources.dtype(name)
    shape = tuple(value.shape)
    assert len(shape) == ndim
    data = from_float32(np.ascontiguousarray(value.numpy()), dtype).reshape(-1)
    assert data.nbytes == num_bytes(dtype, shape)
    return Piece(name, dtype, shape, [data])


def _quantize_inputs(linear: torch.nn.Linear, scheme: Scheme, input_scale: float | None) -> Callable[[], None]:
    handle = linear.register_forward_pre_hook(lambda module, args: (quantized_input(args[0], scheme, input_scale),))
    return handle.remove
