"""Which layers live where: pipeline stages, virtual stages, uneven stages and noop layers, both ways.

Rules (Megatron-LM): stage p of PP holds layers in order; with virtual stages, chunk v of stage p holds the block number
v*PP + p. Noop layers count as layers in this arithmetic but hold no tensors; later layers keep their local index.
"""

from __future__ import annotations

from typing import NamedTuple

from ferry.core.errors import LayoutError


class Chunk(NamedTuple):
    """The layers of one virtual stage. `layers` maps the local index to the Hugging Face layer (None: noop)."""

    stage: int
    virtual: int
    layers: tuple[int | None, ...]
    first: bool
    last: bool


def pipeline(
    num_layers: int, pp: int, vpp: int = 1, layer_list: tuple[int, ...] = (), noop_layers: tuple[int, ...] = ()
) -> tuple[Chunk, ...]:
    """Return all chunks in the order of the model, or raise LayoutError with the legal values."""
    total = num_layers + len(noop_layers)
    sizes = _block_sizes(num_layers, total, pp, vpp, layer_list)
    numbers: list[int | None] = []
    real = iter(range(num_layers))
    _check_noop(noop_layers, total)
    for position in range(total):
        numbers.append(None if position in noop_layers else next(real))
    chunks, start = [], 0
    for block, size in enumerate(sizes):
        layers = tuple(numbers[start : start + size])
        chunks.append(Chunk(block % pp, block // pp, layers, block == 0, block == len(sizes) - 1))
        start += size
    return tuple(chunks)


def _block_sizes(num_layers: int, total: int, pp: int, vpp: int, layer_list: tuple[int, ...]) -> list[int]:
    if layer_list:
        if vpp > 1:
            raise LayoutError(
                "layer_list cannot be combined with vpp", code="layout.layer-list", repair="leave one out"
            )
        if len(layer_list) != pp or sum(layer_list) != total or min(layer_list) < 0:
            raise LayoutError(
                f"layer_list {','.join(map(str, layer_list))} has {len(layer_list)} stages, {sum(layer_list)} layers, "
                f"expected pp={pp} stages and {total} layers",
                code="layout.layer-list",
            )
        return list(layer_list)
    blocks = pp * vpp
    if total % blocks:
        noops = total - num_layers
        extra = f" ({num_layers} and {noops} noop)" if noops else ""
        legal = [str(n) for n in range(1, total + 1) if total % n == 0 and total // n >= 1]
        raise LayoutError(
            f"pp*vpp={blocks} does not divide {total} layers{extra}",
            code="layout.pp-layers",
            repair=f"use a product of {', '.join(legal)}, --layer-list, or --noop-layers",
        )
    return [total // blocks] * blocks


def _check_noop(noop_layers: tuple[int, ...], total: int) -> None:
    if len(set(noop_layers)) != len(noop_layers) or any(not 0 <= layer < total for layer in noop_layers):
        raise LayoutError(
            f"noop_layers {noop_layers} must be different numbers from 0 to {total - 1}", code="layout.noop-layers"
        )
