"""What every rank does: take its place in the mesh, load its slices, resume if there is something to resume, train."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ferry.core.errors import ConfigError, IntegrityError
from ferry.core.family import Model
from ferry.core.gather import Sources
from ferry.core.layout import Part, Slot, whole
from ferry.core.pipeline import pipeline
from ferry.data.vision.pictures import vision_spec
from ferry.devices.device import Device, find
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.opening import open_checkpoint
from ferry.formats.peft import named_for, open_adapter
from ferry.verbs.train.claim import CREW, CREW_LIMIT_S, claim
from ferry.verbs.train.crew.seat import Seat
from ferry.verbs.train.engine.batches import Packing
from ferry.verbs.train.engine.checkpoint import Store
from ferry.verbs.train.engine.context import MicroContext
from ferry.verbs.train.engine.groups import Groups, make_groups
from ferry.verbs.train.engine.loop import Engine, train
from ferry.verbs.train.engine.optimizer import Optimizer, Schedule
from ferry.verbs.train.engine.placement import kv_replicas
from ferry.verbs.train.engine.recording import Recording
from ferry.verbs.train.engine.schedule import Runner
from ferry.verbs.train.engine.sight import build_sight
from ferry.verbs.train.engine.sources import open_sources, validation_samples
from ferry.verbs.train.engine.stage import Built, Recipe, build_stage
from ferry.verbs.train.job import Job

COLLECTIVE_LIMIT = timedelta(hours=2)
"""Longer than any save: the supervisor sees a hang long before."""


def work(seat: Seat, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a worker. Returns how the run ended."""
    job = Job.from_json(payload)
    torch.set_num_threads(job.threads)
    torch.use_deterministic_algorithms(True)
    device = find(job.device)
    device.prepare()
    device.select(seat.local_rank)
    try:
        with claim(job.output / CREW, CREW_LIMIT_S) if seat.rank == 0 else nullcontext():
            return _work(seat, job, device)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(job, str(error)) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise _out_of_memory(job, str(error)) from error
        raise


def _work(seat: Seat, job: Job, device: Device) -> dict[str, Any]:
    _join(seat, device)
    seat.beat(0, "loading")
    assert job.config.model is not None
    checkpoint = open_checkpoint(job.config.model)
    groups = make_groups(job.mesh, seat.rank, device.type, kv_replicas(checkpoint.model, job.mesh.tp))
    where = torch.device(device.type, seat.local_rank) if device.type != "cpu" else torch.device("cpu")
    built = _build(job, checkpoint, groups, where)
    settings = job.config.optimizer
    optimizer = Optimizer(
        [held for one in built for held in one.held], groups, sharded=job.sharded,
        betas=(settings.beta1, settings.beta2), epsilon=settings.epsilon, weight_decay=settings.weight_decay,
    )  # fmt: skip
    store = Store(
        job.checkpoints, groups, sharded=job.sharded, keep=job.config.checkpoint.keep,
        asynchronous=job.config.checkpoint.asynchronous, attempt=seat.attempt, note=seat.event,
        limit_s=job.config.crew.startup_s,
    )  # fmt: skip
    seat.beat(1, "loading")
    first_step = _resume(store, optimizer, job, seat)
    source, validation = open_sources(job)
    runner = Runner([one.stage for one in built], groups, checkpoint.model.dims.hidden_size, _dtype(job.dtype), where)
    schedule = Schedule(settings.schedule, job.lr, settings.min_lr, job.warmup_steps, job.steps)
    with Recording(job, seat.rank, first_step) as recording:
        engine = Engine(
            job, seat, device, groups, runner, optimizer, schedule, _packing(job), source,
            validation_samples(validation, job.seq_len) if validation else [], store, recording.record,
        )  # fmt: skip
        status = train(engine, first_step)
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"status": status, "first_step": first_step, "steps": job.steps}


def _join(seat: Seat, device: Device) -> None:
    if seat.world_size > 1:
        store = seat.store()
        where: dict[str, Any] = (
            {} if store is None else {"store": store, "rank": seat.rank, "world_size": seat.world_size}
        )
        # Small sums of numbers are made on the CPU, whatever the device.
        backend = device.backend if device.type == "cpu" else f"cpu:gloo,{device.type}:{device.backend}"
        dist.init_process_group(backend, timeout=COLLECTIVE_LIMIT, **where)


def _build(job: Job, checkpoint: Checkpoint, groups: Groups, where: torch.device) -> list[Built]:
    """Return this rank's chunks, loaded, and sharded over dp if the job says so."""
    context = MicroContext(job.config.seed)
    lora, dims = job.config.lora, checkpoint.model.dims
    recipe = Recipe(
        dtype=_dtype(job.dtype), device=where, recompute=job.config.layout.recompute, adapters=frozenset(job.modules),
        rank=lora.rank if job.modules else 0, scale=job.lora_scale, dropout=lora.dropout, seed=job.config.seed,
    )  # fmt: skip
    chunks = pipeline(dims.num_layers, job.mesh.pp, job.mesh.vpp, job.config.layout.layer_list)
    own = [chunk for chunk in chunks if chunk.stage == groups.pp_rank]
    given = job.config.adapter
    adapter = Sources(adapter_slots(given, checkpoint.model)) if given is not None else None
    with Sources(checkpoint.slots) as sources:
        built = [
            build_stage(job.assets, checkpoint.model, chunk, groups, recipe, context, sources, adapter) for chunk in own
        ]
    vision = vision_spec(checkpoint.model, job.assets)
    if vision is not None:
        built[0].stage.sight = build_sight(
            job.assets, checkpoint.model, checkpoint.carried, vision, recipe.dtype, where
        )
    if job.sharded:
        for one in built:
            _shard(one, groups, recipe.dtype)
    return built


def _shard(built: Built, groups: Groups, dtype: torch.dtype) -> None:
    """Shard a stage over dp (FSDP2): layer by layer, then what is left. Gradients are summed, not averaged."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if dtype != torch.float32 else MixedPrecisionPolicy()
    for layer in built.stage.decoder.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=groups.dp_mesh, mp_policy=policy)
    fully_shard(built.stage, mesh=groups.dp_mesh, mp_policy=policy)
    for module in built.stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def adapter_slots(directory: Path, model: Model) -> list[Slot]:
    """Return the matrices of a PEFT adapter as slots of canonical tensors."""
    slots = []
    for module, pair in named_for(open_adapter(directory), model).modules.items():
        for letter, stored in (("A", pair.a), ("B", pair.b)):
            part = Part(f"{module}.lora_{letter}.weight", 0, *stored.shape)
            slots.append(Slot(stored.path, stored.offset, stored.dtype, whole(part), part.name))
    return slots


def _resume(store: Store, optimizer: Optimizer, job: Job, seat: Seat) -> int:
    """Restore the newest good checkpoint and return the number of steps that are done."""
    state = store.newest()
    if state is None:
        seat.event("fresh", steps=job.steps)
        return 0
    if state.values.get("identity") != job.identity:
        raise IntegrityError(
            f"checkpoint {state.directory.name} belongs to a run with other settings or other data",
            code="train.other-run",
            repair="choose another --output, or --overwrite to begin anew",
        )
    if state.step > job.steps:
        raise ConfigError(
            f"the newest checkpoint is of step {state.step}, --steps is {job.steps}",
            code="train.steps",
            repair=f"give --steps of at least {state.step}, or --overwrite to begin anew",
        )
    store.restore(state, optimizer)
    seat.event("resumed", step=state.step, mesh=str(job.mesh), saved_from=state.values.get("mesh"))
    return state.step


def _packing(job: Job) -> Packing:
    mesh, rows = job.mesh, job.config.rows
    return Packing(
        global_batch=job.global_batch,
        capacity=job.config.micro_batch * job.seq_len,
        dp=mesh.dp,
        min_rows=mesh.pp,
        multiple=mesh.pp if mesh.vpp > 1 else 1,
        uniform=mesh.pp > 1,
        packing=rows.packing,
    )


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _out_of_memory(job: Job, text: str) -> ConfigError:
    return ConfigError(
        f"out of memory with {job.mesh}, micro_batch={job.config.micro_batch}, seq_len={job.seq_len}: {text[:160]}",
        code="train.memory",
        repair="lower --seq-len or --micro-batch, --set layout.recompute=true, or raise --tp, --pp or --dp",
    )
