"""AdamW on float32 masters, with gradients summed over the right groups and clipped by one global norm.

Every parameter is optimized through a plain float32 tensor that this rank owns: the parameter itself, its shard, or a
master copy where the parameter is bfloat16. So one code path serves every layout, and state is saved as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ferry.verbs.train.engine.groups import Groups, sum_scalars
from ferry.verbs.train.engine.parameters import Held, local_of

BUCKET_ITEMS = 1 << 24
MOMENTS = ("exp_avg", "exp_avg_sq")


class Schedule(NamedTuple):
    """Linear warm-up to `peak`, then a decay to `floor` at the last of `steps`."""

    kind: str
    peak: float
    floor: float
    warmup: int
    steps: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (counted from 0)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (self.peak - self.floor) * left


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over everything a rank holds."""

    def __init__(
        self, held: Sequence[Held], groups: Groups, *, sharded: bool, betas: tuple[float, float], epsilon: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        self.held = list(held)
        self._groups, self._sharded = groups, sharded
        self.masters = [_master(item, groups) for item in self.held]
        self._is_copy = [item.local.dtype != torch.float32 for item in self.held]
        self._sums = [
            torch.zeros_like(master) if copy else None for master, copy in zip(self.masters, self._is_copy, strict=True)
        ]
        self._accumulate_in_float32()
        decayed = [master for item, master in zip(self.held, self.masters, strict=True) if item.decays]
        others = [master for item, master in zip(self.held, self.masters, strict=True) if not item.decays]
        settings = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in settings if group["params"]], lr=0.0, betas=betas, eps=epsilon, fused=True
        )
        self.num_updates = 0

    def state_of(self, index: int) -> dict[str, torch.Tensor]:
        """Return the master and both moments of a parameter; the moments are made if there are none yet."""
        state = self._state(index)
        return {"": self.masters[index], **{name: state[name] for name in MOMENTS}}

    def restore(self, index: int, values: dict[str, torch.Tensor], num_updates: int) -> None:
        """Take saved values of a parameter: those of `state_of`."""
        master = self.masters[index]
        with torch.no_grad():
            master.copy_(values[""])
            self.held[index].local.copy_(master)
            state = self._state(index)
            for name in MOMENTS:
                state[name].copy_(values[name])
            state["step"].fill_(num_updates)
        self.num_updates = num_updates

    def reduce(self) -> float:
        """Sum every gradient over the groups that hold a part of it, and return the global norm before clipping."""
        grads = [self._gradient(index) for index in range(len(self.held))]
        groups = self._groups
        by_sync = {"tp": groups.tp, "kv": groups.kv}
        for word, group in by_sync.items():
            _sum_all([g for g, item in zip(grads, self.held, strict=True) if item.place.sync == word], group)
        _sum_all([g for g, item in zip(grads, self.held, strict=True) if item.at_both_ends], groups.ends)
        if not self._sharded:
            _sum_all(grads, groups.dp)
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        counted = [grad for grad, item in zip(grads, self.held, strict=True) if item.place.owned and grad.numel()]
        squares = sum(float(norm) ** 2 for norm in torch._foreach_norm(counted)) if counted else 0.0
        return math.sqrt(sum_scalars([squares], [groups.tp, groups.pp, groups.dp if self._sharded else None])[0])

    def step(self, rate: float, norm: float, clip: float) -> None:
        """Clip by the norm that `reduce` returned (as `clip_grad_norm_` of torch does), update, forget gradients."""
        if clip and norm > clip:
            torch._foreach_mul_([m.grad for m in self.masters if m.grad is not None], clip / (norm + 1e-6))
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.num_updates += 1
        with torch.no_grad():
            for item, master, copy in zip(self.held, self.masters, self._is_copy, strict=True):
                if copy:
                    item.local.copy_(master)
        self.forget()

    def forget(self) -> None:
        """Drop all gradients."""
        for item, master, total in zip(self.held, self.masters, self._sums, strict=True):
            item.parameter.grad = None
            master.grad = None
            if total is not None:
                total.zero_()

    def _gradient(self, index: int) -> torch.Tensor:
        total = self._sums[index]
        if total is not None and not self._sharded:
            return total
        grad = self.held[index].parameter.grad
        if grad is None:
            return torch.zeros_like(self.masters[index])
        local = local_of(grad).detach()
        return local.float() if local.dtype != torch.float32 else local

    def _accumulate_in_float32(self) -> None:
        """Add the gradients of micro-batches up in float32 where a parameter is not. FSDP reduces in float32 itself."""
        if self._sharded:
            return
        for item, total in zip(self.held, self._sums, strict=True):
            if total is not None:
                item.parameter.register_post_accumulate_grad_hook(_adder(total))  # type: ignore[no-untyped-call]

    def _state(self, index: int) -> dict[str, torch.Tensor]:
        master = self.masters[index]
        state: dict[str, torch.Tensor] = self._adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(master)
        return state


def _adder(total: torch.Tensor):  # type: ignore[no-untyped-def]
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add


def _master(item: Held, groups: Groups) -> torch.Tensor:
    """Return the float32 tensor that is optimized: the parameter itself, or its values as they were loaded."""
    local = item.local.detach()
    if local.dtype == torch.float32:
        return local
    source, item.source = item.source, None
    if source is None:
        return local.float()
    if source.shape != local.shape:  # FSDP2 cuts the first dimension into ceil(n / dp)
        size = -(-source.shape[0] // groups.mesh.dp)
        source = source[groups.dp_rank * size : (groups.dp_rank + 1) * size].clone()
    assert source.shape == local.shape
    return source.to(local.device)


def _sum_all(grads: Iterable[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum tensors over a group in place, many at a time."""
    if group is None:
        return
    bucket: list[torch.Tensor] = []
    for grad in grads:
        bucket.append(grad)
        if sum(tensor.numel() for tensor in bucket) >= BUCKET_ITEMS:
            _sum_bucket(bucket, group)
            bucket = []
    _sum_bucket(bucket, group)


def _sum_bucket(bucket: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    if not bucket:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat, group=group)
    at = 0
    for tensor in bucket:
        tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
        at += tensor.numel()
