"""The training loop: batch, passes, sums, clip, update, measure, save. One screen, in the order it happens."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ferry.core.errors import GateError
from ferry.core.metrics import StepMetrics, ValidationPoint
from ferry.devices.device import Device
from ferry.verbs.train.crew.seat import Seat
from ferry.verbs.train.engine.batches import Packing, Sample, SampleSource, StepBatch, pack, step_batch
from ferry.verbs.train.engine.checkpoint import Store
from ferry.verbs.train.engine.groups import Groups, sum_scalars
from ferry.verbs.train.engine.optimizer import Optimizer, Schedule
from ferry.verbs.train.engine.schedule import Runner
from ferry.verbs.train.job import Job

DONE, STOPPED = "done", "stopped"


class Engine(NamedTuple):
    """Everything a rank trains with."""

    job: Job
    seat: Seat
    device: Device
    groups: Groups
    runner: Runner
    optimizer: Optimizer
    schedule: Schedule
    packing: Packing
    source: SampleSource
    validation: list[Sample]
    store: Store
    record: Callable[[StepMetrics | ValidationPoint], None]


def train(engine: Engine, first_step: int) -> str:
    """Train from `first_step` (counted from 0) to the end; return `done`, or `stopped` when asked to leave."""
    job, seat, store = engine.job, engine.seat, engine.store
    saved = first_step
    if engine.validation and (first_step == 0 or _is_due(job, first_step)):
        # Also where a kill came between the save and the validation of this step.
        seat.beat(first_step, "validating")
        _validate(engine, first_step)
    for step in range(first_step, job.steps):
        seat.beat(step + 1, "training")
        store.check()
        stop = _train_step(engine, step)
        last = step + 1 == job.steps
        if stop or last or (step + 1) % job.save_every == 0:
            seat.beat(step + 1, "saving")
            store.save(step + 1, engine.optimizer, state_values(engine, step + 1))
            saved = step + 1
        if engine.validation and _is_due(job, step + 1):
            seat.beat(step + 1, "validating")
            _validate(engine, step + 1)
        if stop:
            break
    seat.beat(saved, "saving")
    store.wait()
    _meet(engine.groups)
    return DONE if saved == job.steps else STOPPED


def state_values(engine: Engine, step: int) -> dict[str, Any]:
    """Return what a checkpoint holds besides tensors: where the schedule, the data and the random numbers stand.

    Order, dropout and adapters are functions of the seed and of these numbers: there is no other random state.
    """
    job = engine.job
    return {
        "num_updates": engine.optimizer.num_updates,
        "lr": engine.schedule.rate(step),
        "data": {"sha256": job.data.sha256, "next_sample": step * job.global_batch},
        "rng": {"seed": job.config.seed, "step": step},
        "mesh": engine.groups.mesh._asdict(),
        "sharded": job.sharded,
        "identity": job.identity,
    }


def _train_step(engine: Engine, step: int) -> bool:
    """Do one optimizer step and record it; return whether somebody wants the run to end."""
    groups, job = engine.groups, engine.job
    started_s, cpu_s = time.monotonic(), _cpu_seconds()
    batch = step_batch(engine.source, engine.packing, step, groups.dp_rank)
    torch.manual_seed(job.config.seed * 1_000_003 + step)  # for dropout inside model code, if it has any
    loss = engine.runner.run(batch.rows, step, 1.0 / max(1, batch.num_supervised))
    norm = engine.optimizer.reduce()
    loss = sum_scalars([loss], [groups.dp, groups.pp])[0]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(engine, step, batch, loss, norm)
    rate = engine.schedule.rate(step)
    engine.optimizer.step(rate, norm, job.config.optimizer.clip)
    cpu_total, stops = sum_scalars([_cpu_seconds() - cpu_s, float(engine.seat.stop_requested())], [_world(groups)])
    peak = _largest(engine.device.peak_bytes(engine.seat.local_rank), groups)
    if groups.rank == 0:
        elapsed_s = time.monotonic() - started_s
        engine.record(_metrics(engine, step, batch, (loss, rate, norm), elapsed_s, cpu_total, peak))
    return stops > 0


def _metrics(
    engine: Engine, step: int, batch: StepBatch, found: tuple[float, float, float], elapsed_s: float, cpu_s: float,
    peak_bytes: int,
) -> StepMetrics:  # fmt: skip
    job, devices = engine.job, engine.groups.mesh.num_ranks
    rate, peak_flops = batch.num_tokens / elapsed_s, engine.device.flops(job.dtype)
    mfu = rate * job.flops_per_token / (devices * peak_flops) if peak_flops else None
    loss, lr, norm = found
    return StepMetrics(
        step=step + 1, loss=loss, lr=lr, grad_norm=norm, num_tokens=batch.num_tokens,
        num_supervised=batch.num_supervised, num_padding=batch.num_padding, num_samples=batch.num_samples,
        step_s=elapsed_s, cpu_s=cpu_s, tokens_per_s=rate,
        tokens_per_s_per_device=job.global_batch * job.seq_len / (devices * elapsed_s), mfu=mfu,
        peak_memory_bytes=peak_bytes, epoch=batch.epoch, ts=round(time.time(), 3), generation=engine.seat.generation,
    )  # fmt: skip


def _validate(engine: Engine, step: int) -> None:
    """Compute the mean loss over all supervised tokens of the validation samples."""
    groups, size = engine.groups, engine.packing.global_batch
    total, count = 0.0, 0
    for first in range(0, len(engine.validation), size):
        batch = pack(engine.validation[first : first + size], engine.packing, groups.dp_rank, first, 0.0)
        total += sum_scalars([engine.runner.run(batch.rows, step, 1.0, train=False)], [groups.dp, groups.pp])[0]
        count += batch.num_supervised
        engine.seat.beat(first, "validating")
    if groups.rank == 0:
        point = ValidationPoint(step, total / max(1, count), count, round(time.time(), 3))
        engine.record(point)
        engine.seat.event("validated", step=step, validation_loss=point.validation_loss, validation_tokens=count)


def _is_due(job: Job, step: int) -> bool:
    every = job.config.rows.validate_every
    return step == job.steps or bool(every and step % every == 0)


def _not_finite(engine: Engine, step: int, batch: StepBatch, loss: float, norm: float) -> GateError:
    first = batch.first_sample
    what = "the loss" if not math.isfinite(loss) else "the gradient"
    return GateError(
        f"{what} of step {step + 1} is not finite (loss {loss}, gradient norm {norm}); its batch is samples {first} to "
        f"{first + batch.num_samples - 1} in training order",
        code="train.not-finite",
        repair="the last checkpoint is from before it; lower --lr, or look at these samples, then run again",
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _world(groups: Groups) -> dist.ProcessGroup | None:
    return dist.group.WORLD if groups.mesh.num_ranks > 1 else None


def _largest(value: int, groups: Groups) -> int:
    if groups.mesh.num_ranks == 1:
        return value
    found = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


def _meet(groups: Groups) -> None:
    if groups.mesh.num_ranks > 1:
        dist.barrier()
