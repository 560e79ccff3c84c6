"""Pass 1: calibration text through the original blocks, one after another; what it shows becomes scales.

The text runs through the float model only, so what is found for one block does not depend on how another one was
quantized. A block is smoothed in memory and compared with itself before its scales count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ferry.core.progress import Reporter
from ferry.core.quantized import Scheme
from ferry.core.smoothing import Group, groups, layer_tensors
from ferry.engines.blocks import Blocks, Layer
from ferry.verbs.quantize import awq
from ferry.verbs.quantize import factors as f
from ferry.verbs.quantize.journal import Journal, WindowFile, read_tensors_file, write_tensors_file
from ferry.verbs.quantize.numerics import (
    is_per_tensor,
    quantized_input,
    quantized_weight,
    scale_of_range,
    squared_error,
)
from ferry.verbs.quantize.scales import Arrays, LayerScales, clip_to_steps, layer_digest
from ferry.verbs.quantize.search import readers_of, search_strength, some_outputs, statistics_of, weight_absmax
from ferry.verbs.quantize.statistics import Seen, shared_inputs, watch

HELD_BACK = 8
"""Every so many windows one is kept back from the statistics, for searching strengths."""
ROWS = {8: 512, 4: 2048}
"""Rows kept of each input, by the bits of a weight: enough that more change little (measured on a small model)."""
LEAST_TOKENS = 32
"""An expert that saw fewer is rounded to nearest, without factors of its own."""


@dataclass(frozen=True)
class Recipe:
    """How scales are found. `strength` None is searched; `scale_dtype` is that of the scales of weights."""

    method: str
    scheme: Scheme
    strength: float | None
    scale_dtype: str
    products: torch.dtype = torch.float32
    """What the text runs through the model in: bfloat16 where the machine multiplies it in hardware."""


def calibrate(
    blocks: Blocks, ids_BT: npt.NDArray[np.int32], recipe: Recipe, journal: Journal, reporter: Reporter
) -> list[LayerScales]:
    """Return the scales of every layer; goes on where the journal ends."""
    num_layers = blocks.model.dims.num_layers
    done = journal.num_done
    reporter.start("calibrating", num_layers, "layers", done=done)
    shape = (*ids_BT.shape, blocks.model.dims.hidden_size)
    states = journal.windows(shape) if done else _embedded(blocks, ids_BT, journal.windows(shape))
    for number in range(done, num_layers):
        behind = journal.new_windows(shape)
        scales = calibrate_layer(blocks, blocks.load(number), states, behind, recipe)
        write_tensors_file(journal.directory / _file(number), scales.arrays)
        journal.add(scales.facts, behind)
        states = behind
        reporter.advance(1)
    reporter.finish()
    return [
        LayerScales(facts, read_tensors_file(journal.directory / _file(number)))
        for number, facts in enumerate(journal.lines)
    ]


def _embedded(blocks: Blocks, ids_BT: npt.NDArray[np.int32], states: WindowFile) -> WindowFile:
    for window in range(len(ids_BT)):
        states.write(window, blocks.embed(ids_BT[window : window + 1])[0].numpy())
    return states


def _file(number: int) -> str:
    return f"scales-{number:05}.safetensors"


def calibrate_layer(
    blocks: Blocks, layer: Layer, states: WindowFile, behind: WindowFile, recipe: Recipe
) -> LayerScales:
    """Return the scales of a layer; its output for `states` goes to `behind`. Afterwards the layer is smoothed."""
    model, number = blocks.model, layer.index
    edges = groups(model, number)
    shared = shared_inputs(layer, edges)
    seen, probe = _observe(blocks, layer, states, behind, shared, recipe)
    found = _Found({}, {"groups": {}, "linears": {}, "experts": _experts(layer, seen, shared)})
    smoothed: dict[str, torch.Tensor] = {}
    for group in edges:
        dtype = blocks.sources.dtype(group.source.name)
        factors = _factors(group, layer, seen, shared, recipe, dtype, found)
        if factors is not None:
            f.fold(layer, group, factors, dtype)
            columns = f.over_columns(factors, group)
            smoothed |= {part.name.removesuffix(".weight"): columns for part in group.into}
    error = squared_error(blocks.run(layer, probe.before), probe.after)
    f.check_smoothed(error, layer, model)
    for name in layer.linears:
        _linear(name, layer, seen[shared[name]], smoothed.get(name), recipe, found)
    owners = sorted({key.rpartition(".")[0] for key in found.arrays})
    digest = layer_digest(blocks.digests, list(layer_tensors(model, number)))
    facts = {"digest": digest, "self_check_nmse": error, "owners": owners, **found.facts}
    return LayerScales(facts, found.arrays)


@dataclass
class _Found:
    arrays: Arrays
    facts: dict[str, Any]

    def put(self, name: str, values: torch.Tensor) -> None:
        self.arrays[name] = values.detach().to(torch.float32).contiguous().numpy()


@dataclass(frozen=True)
class _Probe:
    """One window before and after the layer, for the self-check."""

    before: torch.Tensor
    after: torch.Tensor


def _observe(
    blocks: Blocks, layer: Layer, states: WindowFile, behind: WindowFile, shared: dict[str, str], recipe: Recipe
) -> tuple[dict[str, Seen], _Probe]:
    """Run all windows through the layer."""
    num_windows, length = states.shape[:2]
    weights_only = not recipe.scheme.activations
    held = _held_back(num_windows)
    keeping = range(num_windows) if weights_only else held
    most_rows = ROWS[recipe.scheme.bits]
    stride = max(1, len(keeping) * length // most_rows)
    seen = watch(layer, shared, stride, most_rows, sums=weights_only)
    before = torch.from_numpy(states.read(0))[None]
    probe = _Probe(before, blocks.run(layer, before))
    watches: dict[str, Callable[[torch.Tensor], None]] = {name: item.see for name, item in seen.items()}
    with layer.watched(watches):
        for window in range(num_windows):
            for item in seen.values():
                item.keeps = window in keeping
                item.counts = weights_only or window not in held or num_windows == 1
            h_BTH = torch.from_numpy(states.read(window))[None]
            behind.write(window, blocks.run(layer, h_BTH, recipe.products)[0].to(torch.float32).numpy())
    return seen, probe


def _held_back(num_windows: int) -> list[int]:
    """Return the windows whose rows judge strengths and do not make statistics."""
    held = [window for window in range(num_windows) if window % HELD_BACK == HELD_BACK - 1]
    return held or [num_windows - 1]


def _experts(layer: Layer, seen: dict[str, Seen], shared: dict[str, str]) -> list[dict[str, Any]]:
    """Return how many tokens each expert saw, in the order of the layer."""
    tokens: dict[str, int] = {}
    for name in layer.linears:
        if layer.is_expert(name):
            owner = name.rpartition(".")[0]
            tokens[owner] = max(tokens.get(owner, 0), seen[shared[name]].tokens)
    return [
        {"expert": number, "tokens": count, "fell_back": count < LEAST_TOKENS}
        for number, count in enumerate(tokens.values())
    ]


def _factors(
    group: Group, layer: Layer, seen: dict[str, Seen], shared: dict[str, str], recipe: Recipe, dtype: str, found: _Found
) -> torch.Tensor | None:
    """Return the factors of a group, None for all 1, and note what they were made of."""
    readers = readers_of(group, layer, seen, shared, recipe.scheme)
    keys = {shared[name] for part in group.into if (name := part.name.removesuffix(".weight")) in shared}
    tokens = sum(seen[key].tokens for key in keys)
    if not readers or tokens < LEAST_TOKENS:
        return None
    if is_per_tensor(recipe.scheme) and not group.from_norm:
        return None  # dividing rows would change the one scale of the source
    absmax = statistics_of(group, layer, seen, shared, mean=False)
    found.put(f"{group.key}.input_absmax", absmax)
    note: dict[str, Any]
    if recipe.method == "awq":
        chosen = awq.search_ratio(
            group, layer, readers, mean := statistics_of(group, layer, seen, shared, mean=True), recipe.scheme,
            recipe.scale_dtype, dtype,
        )  # fmt: skip
        note = {"strength": chosen.ratio, "duo": chosen.duo, "errors": [chosen.error_without, chosen.error]}
        means = awq.weight_mean(group, layer, recipe.scheme)
        factors = f.awq(mean, means, chosen.ratio, duo=chosen.duo)
    else:
        strength = recipe.strength
        note = {"strength": strength}
        if strength is None:
            best = search_strength(group, layer, readers, absmax, recipe.scheme, recipe.scale_dtype, dtype)
            strength = best.strength
            note = {"strength": strength, "errors": {f"{key:g}": error for key, error in best.errors.items()}}
        found.facts["groups"][group.key] = note
        if strength is None:
            return None
        factors = f.smoothquant(absmax, weight_absmax(group, layer), strength)
    found.facts["groups"][group.key] = note
    factors = f.settled(factors, group, layer, dtype)
    found.put(f"{group.key}.factors", factors)
    return factors


def _linear(name: str, layer: Layer, seen: Seen, columns: torch.Tensor | None, recipe: Recipe, found: _Found) -> None:
    """Find what a single linear needs, and its error on the kept rows: how much it minds being quantized."""
    rows = seen.rows if columns is None or not len(seen.rows) else seen.rows / columns
    weight = layer.linears[name].weight.data
    clip = None
    if recipe.method == "awq" and len(rows) and seen.tokens >= LEAST_TOKENS:
        clip = awq.search_clip(weight, rows, recipe.scheme, recipe.scale_dtype)
        found.arrays[f"{name}.clip"] = clip_to_steps(clip.numpy())
    input_scale = None
    if recipe.scheme.activations == "tensor" and seen.tokens:
        largest = seen.absmax if columns is None else seen.absmax / columns
        scale = scale_of_range(largest)
        found.put(f"{name}.input_scale", scale.reshape(1))
        input_scale = float(scale)
    error = None
    if len(rows) and (recipe.scheme.activations != "tensor" or input_scale is not None):
        some = some_outputs(weight, recipe.scheme)
        some_clip = None if clip is None else some_outputs(clip, recipe.scheme)
        integers = quantized_weight(some, recipe.scheme, recipe.scale_dtype, some_clip)
        output = quantized_input(rows, recipe.scheme, input_scale) @ integers.T
        error = squared_error(output, rows @ some.T)
    found.facts["linears"][name] = {"nmse": error, "tokens": seen.tokens}
