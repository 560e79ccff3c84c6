"""What `ferry quantize` would do: everything is decided, checked and refused here, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ferry.core.dtypes import num_bytes
from ferry.core.errors import ConfigError, OutputError, UnavailableError
from ferry.core.family import QUERY
from ferry.core.plan import Plan, PlannedFile
from ferry.core.quantized import BOTH_16, Scheme
from ferry.core.staging import StagedDirectory, check_apart, check_target
from ferry.data.settings import parse_item
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import content_id
from ferry.formats.hf import missing_assets, open_hf
from ferry.formats.quantized import FORMATS
from ferry.formats.quantized_format import Format
from ferry.verbs.quantize import preflight
from ferry.verbs.quantize.config import QuantizeConfig
from ferry.verbs.quantize.job import Job
from ferry.verbs.quantize.journal import journal_of
from ferry.verbs.quantize.manual import resolve
from ferry.verbs.quantize.repack import plan_repack
from ferry.verbs.quantize.shards import Shards
from ferry.verbs.quantize.unquantize import plan_dequantize
from ferry.verbs.quantize.writing import check_float, units

NAMES = {"smoothquant": "SmoothQuant", "awq": "AWQ", "rtn": "round to nearest"}
TORCH = ("torch", "transformers")
BLOCK_BYTES = 512
"""The unit of `st_blocks`: weight files have a hole in front while they grow, and take less than their size."""


@dataclass(frozen=True)
class Prepared:
    """A job with its source opened and everything checked."""

    job: Job
    source: Checkpoint
    scheme: Scheme
    format: Format
    scale_dtype: str
    estimate: preflight.Estimate
    choices: tuple[str, ...]


def prepare(job: Job) -> Prepared:
    """Open the source and refuse what is impossible. Writes nothing."""
    assert job.scheme is not None
    source = open_hf(job.model)
    for name, spec in source.specs().items():
        check_float(name, spec.dtype)
    _check_places(job, source)
    if job.fallback_budget and not (job.calibrate or job.scale_input):
        raise ConfigError(
            f"search.fallback_budget={job.fallback_budget}: which linears mind is seen on calibration text, which "
            f"{job.method} does not read",
            code="quantize.fallback",
            repair="leave it out, or use --method smoothquant or awq",
        )
    if job.needs_text:
        _require_torch()
    format = FORMATS[job.format]
    dtype = source.specs()[source.model.part(QUERY).name].dtype
    scale_dtype = format.scale_dtype or dtype
    if (dtype, scale_dtype) == ("BF16", "F16"):
        scale_dtype = BOTH_16  # engines turn the scales they read into the dtype they compute in
    notes = preflight.check(source.model, job)
    estimate = preflight.estimate(source.model, job, dtype, scale_dtype)
    target = job.output if job.write else job.scale_output
    assert target is not None
    check_target(target, bytes_to_go(target, estimate.disk_bytes), overwrite=True)  # that it is free was checked
    notes += preflight.memory_note(estimate, preflight.available_memory_bytes())
    lacking = missing_assets(source.assets)
    if lacking:
        notes += (f"missing in the source, so also in the result: {', '.join(lacking)}",)
    if source.tied_copies:
        notes += (f"left out, being copies of the embedding: {', '.join(source.tied_copies)}",)
    return Prepared(job, source, job.scheme, format, scale_dtype, estimate, (*job.choices, *notes))


def bytes_to_go(target: Path, disk_bytes: int) -> int:
    """Return what a job still needs of the disk: what a stopped run left is used, or thrown away."""
    left = (StagedDirectory(target).work, journal_of(target))
    held = sum(path.stat().st_blocks * BLOCK_BYTES for top in left for path in top.rglob("*") if path.is_file())
    return max(0, disk_bytes - held)


def plan(config: QuantizeConfig) -> Plan:
    """Return what `ferry quantize` would do."""
    job = resolve(config)
    if job.action == "dequantize":
        return plan_dequantize(config)
    if job.action == "repack":
        return plan_repack(config)
    prepared = prepare(job)
    source = prepared.source
    files: tuple[PlannedFile, ...] = ()
    if job.write:
        assert job.output is not None
        parts = units(source, prepared.scheme, prepared.format, prepared.scale_dtype)
        shards = Shards(job.output, parts, job.max_shard_size)
        files = tuple(PlannedFile(name, size) for name, size in shards.expected_bytes().items())
    specs = source.specs().values()
    return Plan(
        verb="quantize",
        summary=f"{NAMES[job.method]} {prepared.scheme.name} as {job.format}: {source.model.family.name}, "
        f"{source.model.dims.num_layers} layers" + ("" if job.write else " (scales only)"),
        inputs={"model": content_id(source)}
        | {f"text {number}": str(path) for number, path in enumerate(job.text.data)},
        output=str(job.output or job.scale_output),
        files=files,
        read_bytes=sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in specs),
        write_bytes=prepared.estimate.disk_bytes,
        memory_bytes=prepared.estimate.peak_memory_bytes,
        choices=prepared.choices,
        details={
            "method": job.method,
            "scheme": prepared.scheme._asdict(),
            "format": job.format,
            "strength": job.strength,
            "fallback_budget": job.fallback_budget,
            "calibrate": job.calibrate,
            "evaluate": job.evaluate,
            "windows": [job.text.num_windows, job.text.window_tokens, job.text.num_held_out],
        },
    )


def _check_places(job: Job, source: Checkpoint) -> None:
    if job.write:
        assert job.output is not None
        check_apart(job.output, source.directory, *_read_besides(job))
        check_target(job.output, overwrite=job.overwrite)
    if job.scale_output is not None:
        if job.scale_output.is_dir():
            raise OutputError(
                f"{job.scale_output} is a directory, expected the name of a file",
                code="output.exists",
                repair=f"say {job.scale_output / 'scales.safetensors'}",
            )
        check_apart(job.scale_output, source.directory, *_read_besides(job))
        _check_scales_beside(job.scale_output, source.directory, "where it would be taken for weights")
        if job.output is not None:
            _check_scales_beside(job.scale_output, job.output, "which becomes visible as a whole")
        # A run that was killed after its scales were made goes on: its journal is still there.
        is_ours = job.output is not None and journal_of(job.output).exists()
        check_target(job.scale_output, overwrite=job.overwrite or is_ours)


def _read_besides(job: Job) -> list[Path]:
    """Return what is read besides the model: with --overwrite, none of it may be replaced."""
    data = [parse_item(item).path for item in job.text.data]
    return [path for path in (job.scale_input, job.text.evaluation, job.text.chat_template, *data) if path is not None]


def _check_scales_beside(scale_output: Path, directory: Path, why_not: str) -> None:
    if scale_output.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(
            f"scale_output={scale_output} lies in {directory}, {why_not}",
            code="quantize.scales",
            repair="keep the scales beside the directory",
        )


def _require_torch() -> None:
    missing = [name for name in TORCH if find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"running text through a model needs {' and '.join(missing)}",
            code="quantize.torch",
            repair="pip install 'llmferry[quantize]', or use --method rtn without text",
        )
