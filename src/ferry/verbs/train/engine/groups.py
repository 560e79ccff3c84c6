"""The process groups of a mesh, and the four collectives that tensor parallelism needs inside autograd.

Ranks are numbered as Megatron does: tensor-parallel fastest, then data, then pipeline. `copy_to` and `sum_over` are
the conjugate pair f and g of Megatron-LM (Shoeybi et al. 2019): one does nothing forwards and sums backwards, the other
the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ferry.core.mesh import Mesh, Place


@dataclass(frozen=True)
class Groups:
    """This rank's place in the mesh, and the groups it talks in. A group of one rank is None: nothing is said."""

    mesh: Mesh
    rank: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    tp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None
    kv: dist.ProcessGroup | None = None
    """Neighbours in tp that share key-value heads, where there are fewer heads than ranks."""
    ends: dist.ProcessGroup | None = None
    """First and last pipeline stage: they both hold a tied embedding."""
    dp_mesh: DeviceMesh | None = None


def make_groups(mesh: Mesh, rank: int, device_type: str, kv_replicas: int) -> Groups:
    """Make all groups. Every rank must call this at the same point: groups are made together."""
    pp_rank, dp_rank, tp_rank = mesh.place(rank)
    if mesh.num_ranks == 1:
        return Groups(mesh, rank, 0, 0, 0)
    whole = init_device_mesh(device_type, (mesh.pp, mesh.dp, mesh.tp), mesh_dim_names=("pp", "dp", "tp"))
    return Groups(
        mesh,
        rank,
        pp_rank,
        dp_rank,
        tp_rank,
        tp=whole["tp"].get_group() if mesh.tp > 1 else None,
        dp=whole["dp"].get_group() if mesh.dp > 1 else None,
        pp=whole["pp"].get_group() if mesh.pp > 1 else None,
        kv=_kv_group(mesh, rank, kv_replicas) if kv_replicas > 1 else None,
        ends=_ends_group(mesh, rank) if mesh.pp > 1 else None,
        dp_mesh=whole["dp"] if mesh.dp > 1 else None,
    )


def _kv_group(mesh: Mesh, rank: int, replicas: int) -> dist.ProcessGroup | None:
    mine = None
    for first in range(0, mesh.num_ranks, replicas):  # tp is the fastest axis, and replicas divides it
        members = list(range(first, first + replicas))
        group = dist.new_group(members)
        mine = group if rank in members else mine
    return mine


def _ends_group(mesh: Mesh, rank: int) -> dist.ProcessGroup | None:
    mine = None
    for dp_rank in range(mesh.dp):
        for tp_rank in range(mesh.tp):
            members = [mesh.rank(Place(0, dp_rank, tp_rank)), mesh.rank(Place(mesh.pp - 1, dp_rank, tp_rank))]
            group = dist.new_group(members)
            mine = group if rank in members else mine
    return mine


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None


def copy_to(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return x; its gradient is summed over the group."""
    return x if group is None else _CopyTo.apply(x, group)  # type: ignore[no-untyped-call]


def sum_over(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return x summed over the group; its gradient passes as it is."""
    return x if group is None else _SumOver.apply(x, group)  # type: ignore[no-untyped-call]


def sum_scalars(values: Sequence[float], groups: Sequence[dist.ProcessGroup | None]) -> list[float]:
    """Return float64 sums of some numbers over several groups, one after the other."""
    total = torch.tensor(list(values), dtype=torch.float64)
    for group in groups:
        if group is not None:
            dist.all_reduce(total, group=group)
    return [float(value) for value in total]
