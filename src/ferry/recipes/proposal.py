"""A mesh for a model that has no recipe: from its sizes, the number of devices and their memory.

The smallest tp*pp that fits, because what is left goes to dp, which waits least on other ranks. At the same product
tensor parallelism inside one node comes before the pipeline, which has a bubble. A tenth of the memory stays free for
what the estimate leaves out. The same question has always the same answer, with the reasons as sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ferry.core.errors import LayoutError
from ferry.core.family import Dims
from ferry.core.mesh import Mesh, even_pp, trainable_tp
from ferry.core.training_memory import MemoryEstimate, Setup, memory_per_rank
from ferry.core.units import size_text

HEADROOM = 0.1
MICRO_BATCHES = (1, 2, 4)
"""As in the manual: beyond 4 sequences a device is busy anyway."""


class Hardware(NamedTuple):
    """The devices of a run. Tensor-parallel ranks share a node."""

    devices: int
    memory_bytes: int
    devices_per_node: int = 8

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * (1 - HEADROOM))


@dataclass(frozen=True)
class Proposal:
    """A mesh with its batch, what it needs on the fullest rank, and why it was chosen."""

    mesh: Mesh
    setup: Setup
    memory: MemoryEstimate
    reasons: tuple[str, ...]

    @property
    def micro_batch(self) -> int:
        return self.setup.micro_batch

    @property
    def checkpointing(self) -> bool:
        return self.setup.checkpointing


def propose(
    dims: Dims, hardware: Hardware, setup: Setup, *, global_batch: int | None = None, model: str = "the model"
) -> Proposal:
    """Return a mesh that fits, or raise LayoutError saying what would. `setup` gives sequence, method and dtype.

    Micro batch and checkpointing of `setup` are chosen here; its sharding is taken as given.
    """
    small = replace(setup, micro_batch=1, checkpointing=True)
    too_large: dict[Mesh, int] = {}
    for mesh in _meshes(dims, hardware, global_batch):
        needed_bytes = memory_per_rank(dims, mesh, _with_batch(small, mesh, global_batch)).total_bytes
        if needed_bytes <= hardware.usable_bytes:
            return _finish(dims, mesh, hardware, small, global_batch, too_large)
        too_large[mesh] = needed_bytes
    raise _too_small(dims, hardware, small, model, too_large)


def fewest_devices(dims: Dims, hardware: Hardware, setup: Setup) -> Mesh | None:
    """Return the smallest mesh without dp that fits devices of this memory: a part of a node, or whole nodes."""
    small, node = replace(setup, micro_batch=1, checkpointing=True), hardware.devices_per_node
    for mesh in _all_meshes(dims, node):
        is_even = node % mesh.num_ranks == 0 or mesh.num_ranks % node == 0
        if is_even and memory_per_rank(dims, mesh, small).total_bytes <= hardware.usable_bytes:
            return mesh
    return None


def _all_meshes(dims: Dims, largest_tp: int) -> list[Mesh]:
    """Return every (tp, pp) the model allows, the fewest ranks first, tp before pp."""
    meshes = [Mesh(tp, pp) for tp in trainable_tp(dims) if tp <= largest_tp for pp in even_pp(dims)]
    return sorted(meshes, key=lambda mesh: (mesh.num_ranks, mesh.pp))


def _meshes(dims: Dims, hardware: Hardware, global_batch: int | None) -> Iterator[Mesh]:
    """Yield the meshes that use all devices and can share the global batch, with enough of it to fill the pipeline."""
    for mesh in _all_meshes(dims, min(hardware.devices_per_node, hardware.devices)):
        dp, left = divmod(hardware.devices, mesh.num_ranks)
        if not left and _fills(mesh._replace(dp=dp), 1, global_batch):
            yield mesh._replace(dp=dp)


def _fills(mesh: Mesh, micro_batch: int, global_batch: int | None) -> bool:
    """Return whether the global batch splits into micro batches, at least one for each stage of the pipeline."""
    if global_batch is None:
        return True
    num_micro_batches, left = divmod(global_batch, micro_batch * mesh.dp)
    return not left and num_micro_batches >= mesh.pp


def _with_batch(setup: Setup, mesh: Mesh, global_batch: int | None) -> Setup:
    if global_batch is None:
        return setup
    return replace(setup, num_micro_batches=global_batch // (setup.micro_batch * mesh.dp))


def _finish(
    dims: Dims, mesh: Mesh, hardware: Hardware, small: Setup, global_batch: int | None, too_large: dict[Mesh, int]
) -> Proposal:
    """Return the mesh with the largest micro batch that fits, without checkpointing if that fits at all."""
    limit = hardware.usable_bytes

    def estimate(micro_batch: int, checkpointing: bool) -> MemoryEstimate:
        setup = replace(small, micro_batch=micro_batch, checkpointing=checkpointing)
        return memory_per_rank(dims, mesh, _with_batch(setup, mesh, global_batch))

    plain = estimate(1, False).total_bytes
    checkpointing = plain > limit
    sizes = [size for size in MICRO_BATCHES if _fills(mesh, size, global_batch)]
    fitting = [size for size in sizes if estimate(size, checkpointing).total_bytes <= limit]
    micro_batch = max(fitting)
    chosen = replace(small, micro_batch=micro_batch, checkpointing=checkpointing)
    memory = estimate(micro_batch, checkpointing)
    room = f"{size_text(limit)} of {size_text(hardware.memory_bytes)} are used, {HEADROOM * 100:.0f} % stay free"
    tried = ", ".join(str(size) for size in sizes)
    reasons = (
        f"tp={mesh.tp} pp={mesh.pp} is the smallest tp*pp that fits: at most {room}{_nearest(too_large)}",
        f"dp={mesh.dp}: {hardware.devices} devices / tp*pp={mesh.tp * mesh.pp}",
        f"micro_batch={micro_batch} is the largest of {tried} that fits: {size_text(memory.total_bytes)}",
        f"activation checkpointing is on: without it a rank needs {size_text(plain)}"
        if checkpointing
        else "activation checkpointing is off: it fits without, and saves a second forward pass",
    )
    return Proposal(mesh, _with_batch(chosen, mesh, global_batch), memory, reasons)


def _nearest(too_large: dict[Mesh, int]) -> str:
    """Return the mesh that came closest, as the end of a sentence."""
    if not too_large:
        return ""
    mesh = min(too_large, key=lambda mesh: too_large[mesh])
    return f"; tp={mesh.tp} pp={mesh.pp} needs {size_text(too_large[mesh])}"


def _too_small(dims: Dims, hardware: Hardware, small: Setup, model: str, too_large: dict[Mesh, int]) -> LayoutError:
    smallest = fewest_devices(dims, hardware, small)
    ways = [f"use a multiple of {smallest.num_ranks} devices (tp={smallest.tp} pp={smallest.pp})"] if smallest else []
    sharded = replace(small, sharding="full")
    if any(memory_per_rank(dims, mesh, sharded).total_bytes <= hardware.usable_bytes for mesh in too_large):
        ways.append("--sharding full")
    if small.trainable == "all":
        ways.append("--method lora")
    found = _nearest(too_large) or "; no tp*pp divides them and the global batch"
    return LayoutError(
        f"{model} does not fit {hardware.devices} devices of {size_text(hardware.memory_bytes)}{found}, "
        f"expected at most {size_text(hardware.usable_bytes)} a device",
        code="mesh.memory",
        repair=", or ".join([*ways, "a shorter --seq-len"]),
    )
