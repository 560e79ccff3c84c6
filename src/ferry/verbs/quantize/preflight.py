"""What is refused before calibration: shapes a format or an engine cannot take, and what disk and memory will not hold.

A format is tried too: a small random linear of each kind is encoded, compared with what the headers would promise, and
decoded again.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ferry.core.dtypes import num_bytes
from ferry.core.environment import memory_bytes
from ferry.core.errors import ConfigError, LayoutError
from ferry.core.family import Model
from ferry.core.quantized import Scheme, quantize
from ferry.core.units import size_text
from ferry.formats.quantized import FORMATS
from ferry.formats.quantized_format import Format
from ferry.recipes.engines import Verdict, cpu_level, runnable, verdicts_here
from ferry.verbs.quantize.job import Job
from ferry.verbs.quantize.linears import Linear, block_weights, linears
from ferry.verbs.quantize.manual import GROUPS

NUMPY_BYTES = 60_000_000
TORCH_BYTES = 360_000_000
"""What Python takes with numpy, and with torch and transformers (measured)."""
WORKING_BYTES = 200_000_000
"""What one window needs inside a block, and what allocators keep."""
BYTES_OF_A_WEIGHT = 12
"""While a weight is rounded: bytes as stored, in float32, its quotients and its integers."""
FLOAT32_BYTES = 4
CPU_MULTIPLE = 32
"""4-bit kernels for CPUs want rows and columns in multiples of this."""
ON_CPU = "vllm-cpu"


class Estimate(NamedTuple):
    """What a job will take. `parts` are (what, bytes) of the memory."""

    disk_bytes: int
    peak_memory_bytes: int
    parts: tuple[tuple[str, int], ...]


def check(model: Model, job: Job) -> tuple[str, ...]:
    """Refuse what cannot work for this model; return what is worth knowing, in sentences."""
    assert job.scheme is not None
    format = FORMATS[job.format]
    kinds = linears(model)
    for linear in kinds:
        _check_group(linear, job.scheme, job.tp)
        _check_format(linear, job.scheme, job.tp, format)
    notes = check_engines(job.targets, job.scheme, job.format)
    if model.dims.num_experts and job.scheme.activations == "tensor":
        notes += ("vLLM runs experts with a scale for each token only (read in its source): leave --per-token on",)
    if ON_CPU in job.targets and job.scheme.bits == 4:
        _check_multiples(kinds, job.tp)
    try_format(kinds, job.scheme, format)
    return notes


def check_engines(
    targets: tuple[str, ...], scheme: Scheme, format_name: str, cpu: str | None = None
) -> tuple[str, ...]:
    """Refuse engines that cannot run a format and scheme on this machine, or on a CPU of another level (AVX2, AVX512).

    Return what is known of the others, in sentences.
    """
    level = cpu_level() if cpu is None else cpu
    return tuple(note for target in targets for note in _check_engine(target, scheme, format_name, level))


def memory_note(estimate: Estimate, available_bytes: int) -> tuple[str, ...]:
    """Return a warning if a job will probably not fit into memory."""
    if estimate.peak_memory_bytes <= available_bytes:
        return ()
    what, largest = max(estimate.parts, key=lambda part: part[1])
    return (
        f"memory may not do: about {size_text(estimate.peak_memory_bytes)} are needed, {size_text(available_bytes)} "
        f"are free; {what} take {size_text(largest)}",
    )


def available_memory_bytes() -> int:
    """Return the memory that can be had without swapping; all of it where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "")
    return int(found) * 1024 if found else memory_bytes()


def estimate(model: Model, job: Job, dtype: str, scale_dtype: str) -> Estimate:
    """Return what a job will take. `dtype` is that of the model's float tensors, `scale_dtype` that of the scales."""
    parts = _memory(model, job)
    return Estimate(
        disk_bytes=(_disk(model, job, dtype, scale_dtype) if job.write else 0) + _states_on_disk(model, job),
        peak_memory_bytes=sum(size for _, size in parts),
        parts=tuple(parts),
    )


def try_format(kinds: tuple[Linear, ...], scheme: Scheme, format: Format) -> None:
    """Encode a small random linear of each kind; what comes out must be what headers promise, and decode to itself."""
    random = np.random.default_rng(0)
    for kind in sorted({linear.kind for linear in kinds}):
        rows, cols = 32, max(scheme.group, 64)
        weight_NK = random.standard_normal((rows, cols), np.float32)
        input_scale = 0.125 if scheme.activations == "tensor" else None
        integers = quantize(weight_NK, scheme, "F16", input_scale=input_scale)
        promised = format.stored(kind, rows, cols, scheme, "F16")
        stored = format.encode(kind, integers)
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
        assert found == promised, f"{format.name} promises {promised} and writes {found}"
        back = format.decode(kind, stored.__getitem__, scheme)
        assert np.array_equal(back.values, integers.values), f"{format.name} changes integers of {kind}"
        assert np.array_equal(back.scales, integers.scales), f"{format.name} changes scales of {kind}"


def _check_group(linear: Linear, scheme: Scheme, tp: int) -> None:
    cols = linear.of_rank(tp)[1]
    if scheme.group > 0 and cols % scheme.group:
        fitting = [str(group) for group in GROUPS if cols % group == 0]
        rank = f" of a rank at tp={tp}" if tp > 1 else ""
        raise LayoutError(
            f"group_size={scheme.group} does not divide the {cols} weights in a row of {linear.kind}{rank}",
            code="quantize.group",
            repair=f"use {' or '.join(fitting)}" if fitting else "use 8 bits",
        )


def _check_format(linear: Linear, scheme: Scheme, tp: int, format: Format) -> None:
    """Ask the format about the whole weight and about one rank's part of it."""
    for rows, cols, where in ((linear.rows, linear.cols, ""), (*linear.of_rank(tp), f" of a rank at tp={tp}")):
        reason = format.refuses(scheme, rows, cols)
        if reason:
            raise LayoutError(
                f"{linear.kind} [{rows}, {cols}]{where}: {reason}",
                code="quantize.format",
                repair="use another --format, or a smaller --tp" if where else "use another --format",
            )


def _check_multiples(kinds: tuple[Linear, ...], tp: int) -> None:
    for linear in kinds:
        rows, cols = linear.of_rank(tp)
        if rows % CPU_MULTIPLE or cols % CPU_MULTIPLE:
            raise LayoutError(
                f"{linear.kind} [{rows}, {cols}]: 4-bit kernels of {ON_CPU} want multiples of {CPU_MULTIPLE}",
                code="quantize.target",
                repair="use --method smoothquant (8 bits)",
            )


def _check_engine(target: str, scheme: Scheme, format_name: str, cpu: str) -> list[str]:
    """Refuse an engine that cannot run the result; say under which condition it can, where there is one."""
    known = verdicts_here(format_name, scheme.name, scheme.activations, cpu=cpu)
    found = [verdict for verdict in known if verdict.engine == target and verdict.here is not False]
    refusing = [verdict for verdict in found if verdict.runs is False]
    if refusing and len(refusing) == len(found):
        raise _cannot(refusing[0], scheme, format_name, cpu)
    if not found:
        return [f"{target}: not known whether it runs {format_name} {scheme.name} on this machine"]
    return [verdict.text for verdict in found if verdict.here is None or verdict.runs is None or verdict.note]


def _cannot(verdict: Verdict, scheme: Scheme, format_name: str, cpu: str) -> ConfigError:
    others = [f"--format {name} with {what}" for name, what in runnable(verdict.engine, cpu)]
    known = verdicts_here(format_name, scheme.name, scheme.activations, cpu=cpu)
    engines = dict.fromkeys(other.engine for other in known if other.runs and other.here is not False)
    also = f"; {format_name} {scheme.name} runs in {', '.join(engines)}" if engines else ""
    where = f" ({verdict.condition})" if verdict.condition else ""
    return ConfigError(
        f"{verdict.engine}{where} does not run {format_name} {scheme.name}: {verdict.note}",
        code="quantize.target",
        repair=f"it runs {' or '.join(others) or 'no format known here'}{also}; for another machine leave --target out",
    )


def _memory(model: Model, job: Job) -> list[tuple[str, int]]:
    """Return the parts of the peak: a block, what it takes to work on it, streams of held-out text; or one weight.

    Peaks that were measured: 480 MB for a model of 135 M, 930 MB for 1.4 B.
    """
    largest = max(linear.rows * linear.cols for linear in linears(model))
    if not job.needs_text:
        return [("Python and numpy", NUMPY_BYTES), ("one weight while it is rounded", largest * BYTES_OF_A_WEIGHT)]
    streams = 2 * job.text.num_held_out * _window_bytes(model, job) if job.evaluate else 0
    return [
        ("Python and torch", TORCH_BYTES),
        ("a block in float32", block_weights(model) * FLOAT32_BYTES),
        ("three copies of its largest weight", 3 * largest * FLOAT32_BYTES),
        ("two streams of held-out text", streams),
        ("working memory", WORKING_BYTES),
    ]


def _window_bytes(model: Model, job: Job) -> int:
    return job.text.window_tokens * model.dims.hidden_size * FLOAT32_BYTES


def _states_on_disk(model: Model, job: Job) -> int:
    """Return the peak of the states that journals keep: those before and behind a block, in pass 2 of two streams."""
    calibration = job.text.num_windows if job.calibrate else 0
    held_out = job.text.num_held_out if job.evaluate else 0
    return max(2 * calibration, calibration + 4 * held_out) * _window_bytes(model, job)


def _disk(model: Model, job: Job, dtype: str, scale_dtype: str) -> int:
    """Return the bytes of the tensors that will be written."""
    assert job.scheme is not None
    canonical = model.canonical()
    total = sum(num_bytes(dtype, shape) for shape in canonical.values())
    for linear in linears(model):
        stored = FORMATS[job.format].stored(linear.kind, linear.rows, linear.cols, job.scheme, scale_dtype)
        saved = num_bytes(dtype, (linear.rows, linear.cols)) - sum(num_bytes(*item) for item in stored.values())
        total -= int(saved * linear.num_linears * (1 - job.fallback_budget))
    return total
