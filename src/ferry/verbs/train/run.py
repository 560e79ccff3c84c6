"""`ferry train`: prepare the data, start the crew, follow it, write the results and the page."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ferry.core.environment import environment
from ferry.core.errors import ConfigError, GateError, OutputError
from ferry.core.metrics import METRICS_FILE, ValidationPoint, read_metrics, read_validation, summary
from ferry.core.progress import Reporter
from ferry.core.record import home
from ferry.core.staging import write_file
from ferry.core.verb import Result
from ferry.data.prepare import PreparedData
from ferry.data.prepare import prepare as prepare_data
from ferry.data.samples import samples_text
from ferry.data.settings import DataSettings
from ferry.data.stream import Stream
from ferry.formats.peft import check_base, check_intact, open_adapter
from ferry.formats.peft_write import base_of
from ferry.verbs.train import merge, runfiles
from ferry.verbs.train.claim import COMMAND, claim
from ferry.verbs.train.config import TrainConfig
from ferry.verbs.train.crew.launch import launch
from ferry.verbs.train.crew.seat import Seat, cluster_from_environment, seat_from_environment
from ferry.verbs.train.crew.spec import CrewSpec, Outcome, error_of
from ferry.verbs.train.following import Follower
from ferry.verbs.train.job import DataPlace, Job
from ferry.verbs.train.plan import Prepared, prepare, threads_of, wanted_results
from ferry.verbs.train.recipe_plan import refuse_to_train
from ferry.verbs.train.tokens import write_tokens

ENTRY = "ferry.verbs.train.engine.worker:work"
PRELOAD = ("torch", "torch.distributed", "torch.distributed.pipelining", "torch.distributed.fsdp", "transformers",
           "ferry.verbs.train.engine.worker")  # fmt: skip
WARMUP_SHARE = 0.03
MAX_SAVE_EVERY = 100
SHOWN_CHARS = 400
"""Of each sample that is shown; all of it is on the page."""


def run(config: TrainConfig, reporter: Reporter) -> Result:
    """Train (or go on training) and return what was made; or merge an adapter."""
    refuse_to_train(config)
    assert config.model is not None
    assert config.output is not None
    if config.action == "merge":
        assert config.adapter is not None
        return {
            "action": "merge",
            **merge.merge(config.model, config.adapter, config.output, reporter, overwrite=config.overwrite),
        }
    if config.tensorboard:
        from ferry.pages.tensorboard import check_available

        check_available()
    prepared = prepare(config)
    if config.action == "tokens":
        return write_tokens(config, prepare_data(_data_settings(prepared), reporter), reporter)
    seat = seat_from_environment()
    # A launcher that starts a rank again starts the same command: only its first start begins anew.
    overwrite = config.overwrite and not (seat is not None and seat.generation)
    if (
        overwrite
        and seat is None
        and cluster_from_environment().num_nodes > 1
        and (config.output / runfiles.RUN).exists()
    ):
        raise OutputError(
            f"{config.output} holds a run, and --overwrite takes one node",
            code="output.exists",
            repair="remove it first",
        )
    runfiles.check_output(config.output, prepared.identity, overwrite=overwrite)
    for choice in prepared.choices:
        reporter.event("choice", text=choice)
    if config.adapter is not None:
        _check_adapter(config.adapter, prepared, reporter)
    data = prepare_data(_data_settings(prepared), reporter)
    job = _job(prepared, data)
    done = {} if overwrite else runfiles.finished(config.output, job.identity, job.steps, wanted_results(config))
    if done:
        reporter.say(f"{config.output} is done already: {job.steps} steps; give more --steps to go on")
        return {**done, "status": "done", "resumed": True}
    leads = seat.rank == 0 if seat is not None else cluster_from_environment().node_rank == 0
    if leads:
        runfiles.begin(config.output, _document(prepared, job, data), overwrite=overwrite)
    elif seat is None:
        runfiles.await_begin(config.output, job.identity)
    with claim(config.output / COMMAND) if leads else nullcontext():
        if seat is not None:
            return _as_worker(seat, job, data, reporter)
        outcome = _follow(job, prepared, data, reporter)
        return _finish(outcome, job, data, reporter)


def _check_adapter(directory: Path, prepared: Prepared, reporter: Reporter) -> None:
    """Refuse an adapter that is damaged, or of another base: one without a manifest is read and hashed for it."""
    adapter = open_adapter(directory)
    check_intact(adapter)
    if adapter.base_sha256:
        check_base(adapter, base_of(prepared.source, reporter).model_sha256, str(prepared.config.model))


def _data_settings(prepared: Prepared) -> DataSettings:
    config, rows = prepared.config, prepared.config.rows
    return DataSettings(
        data=config.data,
        tokenizer_dir=prepared.assets,
        cache_dir=rows.cache or home() / "cache" / "tokens",
        method=config.method,
        seq_len=prepared.seq_len,
        handler=rows.handler,
        train_on=rows.train_on,
        truncation=rows.truncation,
        validation_fraction=rows.validation_fraction,
        validation_data=rows.validation,
        max_bad_fraction=rows.max_bad_fraction,
        num_workers=rows.workers,
        seed=config.seed,
        chat_template=rows.chat_template,
        vision=prepared.vision,
    )


def _job(prepared: Prepared, data: PreparedData) -> Job:
    """Return the run with the decisions that needed the data."""
    config = prepared.config
    per_epoch = data.train.num_samples
    if config.method == "pretrain":
        per_epoch = Stream(data.train, prepared.seq_len).epoch(config.seed, 0).num_sequences
    elif prepared.mesh.dp > 1 and not config.rows.packing and prepared.global_batch % prepared.mesh.dp:
        raise ConfigError(
            f"global_batch={prepared.global_batch} is no multiple of dp={prepared.mesh.dp}, and packing is off",
            code="mesh.batch",
            repair="change one of them, or allow packing",
        )
    steps = config.steps or max(1, math.ceil((config.epochs or 1.0) * per_epoch / prepared.global_batch))
    warmup = config.optimizer.warmup_steps
    return Job(
        config=config,
        mesh=prepared.mesh,
        assets=prepared.assets.absolute(),
        steps=steps,
        save_every=config.save_every or max(1, min(MAX_SAVE_EVERY, steps // 10)),
        seq_len=prepared.seq_len,
        global_batch=prepared.global_batch,
        lr=prepared.lr,
        warmup_steps=math.ceil(WARMUP_SHARE * steps) if warmup is None else warmup,
        dtype=prepared.dtype,
        device=prepared.device.type,
        sharded=prepared.sharded,
        modules=prepared.modules,
        threads=threads_of(prepared),
        flops_per_token=prepared.flops(),
        data=_data_place(prepared, data),
        identity=runfiles.identity_of(prepared.identity, data.train.sha256),
    )


def _data_place(prepared: Prepared, data: PreparedData) -> DataPlace:
    rows = prepared.config.rows
    return DataPlace(
        train=tuple(str(Path(part).absolute()) for part in data.directories),
        weights=tuple(data.train.weights) if data.train.weights is not None else None,
        validation=tuple(str(Path(part).absolute()) for part in data.validation_directories),
        validation_fraction=rows.validation_fraction,
        seed=prepared.config.seed,
        sha256=data.train.sha256,
        num_samples=data.train.num_samples,
    )


def _document(prepared: Prepared, job: Job, data: PreparedData) -> dict[str, Any]:
    """Return what run.json says."""
    return {
        "schema": "ferry.training-run/1",
        "identity": prepared.identity,
        "config": job.config.model_dump(mode="json"),
        "decided": {
            key: value for key, value in job.to_json().items() if key not in ("config", "assets", "data", "modules")
        },
        "choices": [*prepared.choices, *data.choices],
        "data": data.facts,
        "samples": data.examples,
        "environment": environment(),
    }


def _as_worker(seat: Seat, job: Job, data: PreparedData, reporter: Reporter) -> Result:
    """Train as one rank that a launcher (torchrun, Slurm ...) has started."""
    from ferry.verbs.train.engine.worker import work

    result = work(seat, job.to_json())
    if seat.rank != 0:
        return {"action": "run", "status": result["status"], "rank": seat.rank, "artifact": None}
    return _finish(Outcome(result["status"], result), job, data, reporter)


def _follow(job: Job, prepared: Prepared, data: PreparedData, reporter: Reporter) -> Outcome:
    """Run the crew, and show its progress."""
    crew, cluster = job.config.crew, cluster_from_environment()
    spec = CrewSpec(
        entry=ENTRY,
        preload=PRELOAD,
        output=job.output,
        payload=job.to_json(),
        num_workers=job.mesh.num_ranks // cluster.num_nodes,
        restart=crew.restart,
        same_step_limit=crew.max_failures,
        hang_factor=crew.hang_factor,
        hang_slack_s=crew.hang_extra_s,
        quiet_limit_s=crew.startup_s,
        cluster=cluster,
    )
    for choice in (*prepared.choices, *data.choices):
        reporter.say(choice)
    reporter.say(samples_text(data.examples, max_chars=SHOWN_CHARS))
    follower = Follower(job, reporter)
    ended = threading.Event()
    thread = threading.Thread(target=follower.follow, args=(ended,), name="follow", daemon=True)
    thread.start()
    try:
        return launch(spec, follower.event)
    finally:
        ended.set()
        thread.join()
        follower.finish()


def _finish(outcome: Outcome, job: Job, data: PreparedData, reporter: Reporter) -> Result:
    """Write the results of a run that is done; turn a failure into an error; the page is written in any case."""
    if outcome.status == "failed":
        assert outcome.failure is not None
        failure = error_of(outcome.failure)
        try:
            _write_page(job)
        except OSError as error:  # a full disk, most often: what ended the run is the news
            raise failure from error
        raise failure
    node = cluster_from_environment().node_rank if seat_from_environment() is None else 0
    if node:
        # The first node writes the results: all nodes see one output.
        return {"action": "run", "status": outcome.status, "node": node, "output": str(job.output), "artifact": None}
    page = _write_page(job)
    metrics = read_metrics(job.output / METRICS_FILE)
    points = read_validation(job.output / METRICS_FILE)
    result: dict[str, Any] = {
        "action": "run",
        "status": outcome.status,
        "output": str(job.output),
        "method": job.config.method,
        "mesh": job.mesh._asdict(),
        "steps": job.steps,
        "identity": job.identity,
        "artifact": None,
        "summary": _summary(metrics),
        **_validation(points, job.steps),
        "restarts": [restart._asdict() for restart in outcome.restarts],
        "report": str(page),
    }
    if outcome.status == "stopped":
        return result
    from ferry.verbs.train.export import export

    result |= export(job, _facts(job, data, result["summary"]), reporter)
    runfiles.write_document(job.output / runfiles.RESULT, result)
    return result


def _validation(points: Sequence[ValidationPoint], steps: int) -> dict[str, Any]:
    """Return loss and perplexity on the validation data, before the first step and after the last."""
    before = points[0].validation_loss if points and points[0].step == 0 else None
    after = points[-1].validation_loss if points and points[-1].step == steps else None
    return {
        "validation_loss_before": before,
        "validation_loss": after,
        "validation_perplexity_before": None if before is None else math.exp(before),
        "validation_perplexity": None if after is None else math.exp(after),
    }


def _summary(metrics: Any) -> dict[str, Any]:
    if not metrics:
        raise GateError("no step was recorded", code="train.no-steps")
    return dict(summary(metrics).__dict__)


def _facts(job: Job, data: PreparedData, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an artifact's manifest says about its training: no path, no time."""
    return {
        "method": job.config.method,
        "steps": job.steps,
        "global_batch": job.global_batch,
        "seq_len": job.seq_len,
        "lr": job.lr,
        "dtype": job.dtype,
        "seed": job.config.seed,
        "optimizer": job.config.optimizer.model_dump(mode="json"),
        "lora": job.config.lora.model_dump(mode="json") if job.modules else {},
        "data_sha256": data.train.sha256,
        "num_samples": data.train.num_samples,
        "last_loss": found["last_loss"],
    }


def _write_page(job: Job) -> Path:
    from ferry.pages.curves import is_run, read_run
    from ferry.pages.loss import render_page

    path = job.output / "report.html"
    if is_run(job.output):
        title = f"{job.config.method} of {job.config.model.name if job.config.model else ''}"
        write_file(path, render_page([read_run(job.output)], title).encode())
    return path
