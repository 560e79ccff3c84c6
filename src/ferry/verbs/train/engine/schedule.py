"""One step's forward and backward passes over all rows: in a loop, or as a pipeline of stages.

Pipelines run on `torch.distributed.pipelining`: 1F1B (Narayanan et al. 2019), interleaved where a rank has several
chunks. Its stages want one shape for all rows, so rows are padded to a few lengths and a schedule is kept for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from ferry.verbs.train.engine.batches import Micro
from ferry.verbs.train.engine.groups import Groups
from ferry.verbs.train.engine.stage import Stage


class Runner:
    """Runs rows through this rank's stages."""

    def __init__(
        self, stages: Sequence[Stage], groups: Groups, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._stages, self._groups = list(stages), groups
        self._hidden, self._dtype, self._device = hidden, dtype, device
        self._schedules: dict[tuple[int, int, bool], Any] = {}

    def run(self, rows: Sequence[Micro], step: int, loss_scale: float, *, train: bool = True) -> float:
        """Return loss_scale * the sum of this rank's losses (0 without a last stage); in training, make gradients."""
        for stage in self._stages:
            stage.step, stage.loss_scale = step, loss_scale
            stage.train(train)
        with torch.set_grad_enabled(train):
            return self._pipeline(rows, train) if self._groups.pp is not None else self._loop(rows, train)

    def _loop(self, rows: Sequence[Micro], train: bool) -> float:
        (stage,) = self._stages
        total = 0.0
        for index, row in enumerate(rows):
            if isinstance(stage, FSDPModule):
                stage.set_requires_gradient_sync(index == len(rows) - 1)
            tensors = [torch.from_numpy(array)[None].to(self._device) for array in row.arrays]
            loss = stage(*tensors, pictures=row.pictures)
            if train:
                loss.backward()
            total += float(loss.detach())
        return total

    def _pipeline(self, rows: Sequence[Micro], train: bool) -> float:
        ids, positions, labels, token_ids = (
            torch.stack([torch.from_numpy(array) for array in column]).to(self._device)
            for column in zip(*(row.arrays for row in rows), strict=True)
        )
        key = (len(rows), ids.shape[1], train)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(len(rows), ids.shape[1])
        schedule = self._schedules[key]
        has_first = any(stage.chunk.first for stage in self._stages)
        has_last = any(stage.chunk.last for stage in self._stages)
        losses: list[torch.Tensor] = []
        schedule_run = schedule.step if train else schedule.eval
        options: dict[str, Any] = {"positions_BT": positions, "labels_BT": labels, "token_ids_BT": token_ids}
        if has_last:
            options |= {"target": labels, "losses": losses}
        schedule_run(*([ids] if has_first else []), return_outputs=False, **options)
        return sum(float(loss.detach()) for loss in losses)

    def _schedule(self, num_rows: int, length: int) -> Any:
        mesh, count = self._groups.mesh, self._groups.mesh.pp * self._groups.mesh.vpp
        stages = [self._stage(index, stage, count, length) for index, stage in enumerate(self._stages)]
        if mesh.vpp == 1:
            return Schedule1F1B(stages[0], num_rows, loss_fn=_identity, scale_grads=False)
        return ScheduleInterleaved1F1B(list(stages), num_rows, loss_fn=_identity, scale_grads=False)

    def _stage(self, index: int, stage: Stage, count: int, length: int) -> PipelineStage:
        hidden = torch.empty(1, length, self._hidden, dtype=self._dtype, device="meta")
        ids = torch.empty(1, length, dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=torch.float32, device="meta")
        return PipelineStage(
            stage,
            index * self._groups.mesh.pp + self._groups.pp_rank,
            count,
            self._device,
            input_args=ids if stage.chunk.first else hidden.requires_grad_(),
            output_args=loss.requires_grad_() if stage.chunk.last else hidden.clone().requires_grad_(),
            group=self._groups.pp,
        )


def _identity(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The last stage computes the loss itself."""
    return output
