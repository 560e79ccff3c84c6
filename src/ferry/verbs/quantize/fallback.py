"""Which linears stay float: those that mind being quantized most, as far as a budget of weights allows.

Engines fuse query, key and value, gate and up, and all experts of a layer: such a set is quantized whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ferry.core.errors import ConfigError
from ferry.core.family import Model
from ferry.core.smoothing import groups, linears
from ferry.verbs.quantize.scales import LayerScales


class FusedSet(NamedTuple):
    """Linears that an engine computes as one."""

    modules: tuple[str, ...]
    num_weights: int
    nmse: float


def choose(model: Model, layers: tuple[LayerScales, ...], budget: float) -> dict[str, str]:
    """Return module -> why it stays float: the worst sets by error on calibration rows, while they fit the budget."""
    sets = [item for number, scales in enumerate(layers) for item in fused_sets(model, number, scales)]
    total = sum(item.num_weights for item in sets)
    left = budget * total
    found: dict[str, str] = {}
    for item in sorted(sets, key=lambda item: (-item.nmse, item.modules)):
        if 0 < item.num_weights <= left:
            left -= item.num_weights
            reason = f"error {item.nmse:.1e} on calibration rows, within the budget of {budget:.1%} of all weights"
            found |= dict.fromkeys(item.modules, reason)
    return found


def unscaled(model: Model, layers: tuple[LayerScales, ...]) -> dict[str, str]:
    """Return module -> why it stays float, for static activations: a scale of a set's input is lacking."""
    found: dict[str, str] = {}
    for number, scales in enumerate(layers):
        for item in fused_sets(model, number, scales):
            lacking = [module for module in item.modules if f"{module}.input_scale" not in scales.arrays]
            if lacking:
                reason = f"no calibration token came to {lacking[0]}, so its input has no scale"
                found |= dict.fromkeys(item.modules, reason)
    return found


def check_some_left(model: Model, floats: Mapping[str, str]) -> None:
    """Refuse to write a model of which nothing is quantized: formats have no words for it."""
    if all(linear.module in floats for layer in range(model.dims.num_layers) for linear in linears(model, layer)):
        raise ConfigError(
            f"every linear would stay float: {next(iter(floats.values()))}",
            code="quantize.fallback",
            repair="use a smaller search.fallback_budget, or more calibration text",
        )


def fused_sets(model: Model, number: int, scales: LayerScales) -> list[FusedSet]:
    """Return the sets of a layer. Their error is the mean of their linears'."""
    weights = {linear.module: linear for linear in linears(model, number)}
    owner = {module: module for module in weights}
    experts = [module for module, linear in weights.items() if linear.expert is not None]
    owner |= dict.fromkeys(experts, "experts")
    for group in groups(model, number):
        modules = [module for part in group.into if (module := part.name.removesuffix(".weight")) in weights]
        if not set(modules) & set(experts):
            owner |= dict.fromkeys(modules, group.key)
    found = []
    for key in dict.fromkeys(owner.values()):
        modules = [module for module in weights if owner[module] == key]
        errors = [scales.facts["linears"][module]["nmse"] or 0.0 for module in modules]
        size = sum(weights[module].rows * weights[module].cols for module in modules)
        found.append(FusedSet(tuple(modules), size, sum(errors) / len(errors)))
    return found
