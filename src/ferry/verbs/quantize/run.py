"""`ferry quantize`: scales from text (pass 1), the quantized model and its proof (pass 2), the manifest, then visible.

Both passes keep a journal beside the output, so that a killed run goes on with the block it was at. torch is imported
only where text runs through the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferry import __version__
from ferry.core.environment import usable_cores
from ferry.core.gather import Sources
from ferry.core.layout import Part
from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory
from ferry.core.verb import Result
from ferry.data.windows import Windows
from ferry.devices.device import find
from ferry.formats.fingerprint import content_id, manifest_of
from ferry.verbs.quantize.config import QuantizeConfig
from ferry.verbs.quantize.job import Job
from ferry.verbs.quantize.journal import Journal, journal_of
from ferry.verbs.quantize.manual import resolve
from ferry.verbs.quantize.outcome import Outcome, finish
from ferry.verbs.quantize.plan import TORCH, Prepared, bytes_to_go, prepare
from ferry.verbs.quantize.reading import cut
from ferry.verbs.quantize.repack import repack
from ferry.verbs.quantize.shards import Shards
from ferry.verbs.quantize.unquantize import dequantize
from ferry.verbs.quantize.writing import entries_of, round_layer, units, write_units

if TYPE_CHECKING:
    from ferry.verbs.quantize.scales import Scales


def run(config: QuantizeConfig, reporter: Reporter) -> Result:
    """Do what the options say, and return where the result is and how far it is from the original."""
    # Threads that spin while they wait take the cores from each other where others compute too. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    job = resolve(config)
    if job.action == "dequantize":
        return dequantize(config, reporter)
    if job.action == "repack":
        return repack(config, reporter)
    prepared = prepare(job)
    for choice in prepared.choices:
        reporter.event("choice", text=choice)
    text = _text(prepared, reporter) if job.needs_text else None
    if not job.write:
        return _scales_alone(prepared, text, reporter)
    return _quantize(prepared, text, config, reporter)


def _scales_alone(prepared: Prepared, text: Windows | None, reporter: Reporter) -> Result:
    """Run pass 1 and no more."""
    job = prepared.job
    assert job.scale_output is not None
    need_bytes = prepared.estimate.disk_bytes
    with StagedDirectory(job.scale_output, need_bytes=need_bytes, overwrite=job.overwrite, keeps=True) as staged:
        scales = _scales(prepared, text, staged.work, reporter)
    return {
        "action": "scales", "artifact": None, "scales": str(job.scale_output), "passed": True, "proof": None,
        "about": scales.about, "choices": list(prepared.choices), "changes": [],
    }  # fmt: skip


def _drop_unless_resumable(hidden: Path, error: BaseException) -> None:
    """Remove a journal, unless the same run could come further next time: it was stopped, or a disk failed it."""
    if isinstance(error, Exception) and not isinstance(error, OSError):
        shutil.rmtree(hidden, ignore_errors=True)


def _quantize(prepared: Prepared, text: Windows | None, config: QuantizeConfig, reporter: Reporter) -> Result:
    job, source = prepared.job, prepared.source
    assert job.output is not None
    need_bytes = bytes_to_go(job.output, prepared.estimate.disk_bytes)
    hidden = journal_of(job.output)
    with StagedDirectory(job.output, need_bytes=need_bytes, overwrite=job.overwrite, keeps=True) as staged:
        try:
            scales = _scales(prepared, text, hidden, reporter) if job.calibrate or job.scale_input else None
            parts = units(source, prepared.scheme, prepared.format, prepared.scale_dtype)
            shards = Shards(staged.work, parts, job.max_shard_size)
            identity = _identity(prepared, text, _pass_2(job, scales))
            journal = Journal(hidden / "pass-2", identity)
            if not shards.hold(entries_of(journal.lines)):
                journal.restart()
            if not journal.num_done:
                staged.clear()
                staged.work.mkdir()
            else:
                reporter.event("resumed", units=journal.num_done)
            with Sources(source.slots) as sources:
                outcome = _write(prepared, text, scales, sources, shards, journal, reporter)
            result = finish(prepared, config, outcome, shards, staged.work, text, scales, reporter)
            staged.commit()
        except BaseException as error:
            _drop_unless_resumable(hidden, error)
            raise
    shutil.rmtree(hidden, ignore_errors=True)
    reporter.event("written", artifact=str(job.output), bytes=result["bytes"], model_sha256=result["model_sha256"])
    return result


def _write(
    prepared: Prepared, text: Windows | None, scales: Scales | None, sources: Sources, shards: Shards, journal: Journal,
    reporter: Reporter,
) -> Outcome:  # fmt: skip
    """Run pass 2, with text through both models where there is text or there are scales."""
    source, job = prepared.source, prepared.job
    promised = manifest_of(source.directory)
    if scales is None and not job.evaluate:

        def round_one(number: int, parts: Mapping[str, Part]) -> tuple[dict[str, Any], dict[str, Any]]:
            line = round_layer(
                number, parts, sources, shards, source, prepared.scheme, prepared.format, prepared.scale_dtype, promised
            )
            return line, {}

        return Outcome(write_units(source, sources, shards, journal, promised, round_one, reporter), None, {})
    from ferry.verbs.quantize.passes import write_with_text

    held_out_BT = text.held_out_BT if text is not None and job.evaluate else None
    return write_with_text(prepared, held_out_BT, scales, sources, shards, journal, promised, reporter)


def _scales(prepared: Prepared, text: Windows | None, hidden: Path, reporter: Reporter) -> Scales:
    """Return the scales of pass 1, or those of the file that was given."""
    from ferry.verbs.quantize.passes import make_scales, scales_of_file

    job = prepared.job
    if job.scale_input is not None:
        return scales_of_file(prepared, job.scale_input, text)
    assert text is not None
    identity = _identity(prepared, text, {"pass": 1, "method": job.method, "strength": job.strength})
    scales = make_scales(prepared, text, Journal(hidden / "pass-1", identity), reporter)
    if job.scale_output is not None:
        job.scale_output.parent.mkdir(parents=True, exist_ok=True)
        scales.write(job.scale_output)
        reporter.event("written", scales=str(job.scale_output))
    return scales


def _pass_2(job: Job, scales: Scales | None) -> dict[str, Any]:
    found: dict[str, Any] = {"pass": 2, "method": job.method, "strength": job.strength, "format": job.format}
    found |= {"budget": job.fallback_budget, "evaluate": job.evaluate, "shards": job.max_shard_size}
    if scales is not None:
        found |= {"about": scales.about, "scales": scales.sha256}
    return found


def _identity(prepared: Prepared, text: Windows | None, decided: dict[str, Any]) -> str:
    """Return a digest of all that decides what a pass makes: a journal of another one is of no use."""
    versions = {name: version(name) for name in TORCH if find_spec(name) is not None}
    document = {
        "versions": {"ferry": __version__, **versions},
        "cpu": find("cpu").dtype().dtype,
        "source": content_id(prepared.source),
        "config": prepared.source.model.config,
        "scheme": prepared.scheme._asdict(),
        "scale_dtype": prepared.scale_dtype,
        "text": [text.sha256, text.held_out_sha256] if text is not None else [],
        "threads": prepared.job.threads or os.environ.get("OMP_NUM_THREADS") or usable_cores(),
        **decided,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _text(prepared: Prepared, reporter: Reporter) -> Windows:
    """Return the windows of tokens, made in a process of its own: a tokenizer and its text need not stay in memory."""
    job = prepared.job
    calibrates = job.calibrate or (job.scale_input is not None and bool(job.text.data))
    found = cut(
        job.text, prepared.source.directory, prepared.source.model.dims.vocab_size, calibrate=calibrates,
        evaluate=job.evaluate,
    )  # fmt: skip
    for choice in found.choices:
        reporter.event("choice", text=choice)
    return found
