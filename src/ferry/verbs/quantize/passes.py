"""Both passes where text runs through the model: the only part of the verb's run that imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ferry.core.errors import InputError
from ferry.core.family import EMBEDDING, FINAL_NORM, HEAD
from ferry.core.gather import Sources
from ferry.core.layout import Part
from ferry.core.manifest import Manifest
from ferry.core.progress import Reporter
from ferry.core.smoothing import layer_tensors
from ferry.data.windows import TextSpec, Windows
from ferry.devices.device import find
from ferry.engines.blocks import Blocks
from ferry.verbs.quantize import fallback
from ferry.verbs.quantize.apply import Streams, Target, apply_layer
from ferry.verbs.quantize.calibrate import Recipe, calibrate
from ferry.verbs.quantize.journal import Journal
from ferry.verbs.quantize.measure import whole_model
from ferry.verbs.quantize.outcome import Outcome
from ferry.verbs.quantize.plan import Prepared
from ferry.verbs.quantize.scales import LayerScales, Scales, check_layer, layer_digest, read_scales
from ferry.verbs.quantize.shards import Shards
from ferry.verbs.quantize.writing import check_source, outside_sha256, write_units

STREAMS = ("original", "quantized")
CPU = torch.device("cpu")


def make_scales(prepared: Prepared, text: Windows, journal: Journal, reporter: Reporter) -> Scales:
    """Run pass 1."""
    job, source = prepared.job, prepared.source
    _set_threads(job.threads)
    products = find("cpu").dtype()
    reporter.event("choice", text=f"calibration text runs in {products.dtype}: {products.reason}")
    dtype = torch.bfloat16 if products.dtype == "bfloat16" else torch.float32
    recipe = Recipe(job.method, prepared.scheme, job.strength, prepared.scale_dtype, dtype)
    with Sources(source.slots) as sources:
        blocks = Blocks(source.directory, source.model, sources, CPU)
        layers = calibrate(blocks, text.calibration_BT, recipe, journal, reporter)
        blocks.let_go()
        outside = outside_sha256(source, sources)
    return Scales(_about(prepared, text, outside), tuple(layers))


def _about(prepared: Prepared, text: Windows, outside: str) -> dict[str, Any]:
    return {
        "outside_sha256": outside,
        "model": prepared.source.directory.resolve().name,
        "family": prepared.source.model.family.name,
        "method": prepared.job.method,
        "scheme": prepared.scheme._asdict(),
        "strength": prepared.job.strength,
        "scale_dtype": prepared.scale_dtype,
        "text": text.name,
        "text_sha256": text.sha256,
        "windows": text.calibration_BT.shape[0],
        "window_tokens": text.calibration_BT.shape[1],
    }


def scales_of_file(prepared: Prepared, path: Path, text: Windows | None) -> Scales:
    """Return the scales of a file; refuse those of another model, method, scheme or text."""
    scales = read_scales(path)
    model = prepared.source.model
    if len(scales.layers) != model.dims.num_layers:
        raise _mismatch(path, f"it has {len(scales.layers)} layers, the model has {model.dims.num_layers}")
    wanted: dict[str, Any] = {
        "method": prepared.job.method,
        "scheme": prepared.scheme._asdict(),
        "scale_dtype": prepared.scale_dtype,
    }
    if text is not None and text.sha256:
        wanted["text_sha256"] = text.sha256
    with Sources(prepared.source.slots) as sources:
        if scales.about.get("outside_sha256") != outside_sha256(prepared.source, sources):
            raise _mismatch(path, "they were made for another model: its embedding, final norm or head differ")
        blocks = Blocks(prepared.source.directory, model, sources, CPU)
        blocks.load(0)
        digest = layer_digest(blocks.digests, list(layer_tensors(model, 0)))
    if text is not None:
        _refuse_seen_text(path, scales.about, text, prepared.job.text)
    for key, value in wanted.items():
        if scales.about.get(key) != value:
            raise _mismatch(path, f"{key} is {scales.about.get(key)}, expected {value}")
    check_layer(digest, scales.layers[0], 0, path)
    return scales


def _refuse_seen_text(path: Path, about: Mapping[str, Any], text: Windows, spec: TextSpec) -> None:
    """Refuse a proof on text that the scales were made from, where no digest of calibration text tells."""
    if text.sha256 or text.held_out_name != about.get("text"):
        return
    windows, length = about.get("windows", 0), about.get("window_tokens", 0)
    left_out = 0 if spec.evaluation is not None else spec.num_windows * spec.window_tokens
    if windows * length > left_out:
        raise _mismatch(
            path,
            f"they were made from the first {windows} windows of {length} tokens of {text.held_out_name}, and some of "
            "these would be held out now",
            repair=f"give the scales' --data, --samples {windows} and --seq-len {length}, or another --evaluation",
        )


def _mismatch(
    path: Path,
    found: str,
    repair: str = "make scales for this model and these options with --generate-scale --scale-output FILE",
) -> InputError:
    return InputError(
        f"the scales in {path} do not fit: {found}",
        code="quantize.scale-mismatch",
        repair=repair,
    )


def write_with_text(
    prepared: Prepared, held_out_BT: npt.NDArray[np.int32] | None, scales: Scales | None, sources: Sources,
    shards: Shards, journal: Journal, promised: Manifest | None, reporter: Reporter,
) -> Outcome:  # fmt: skip
    """Run pass 2 in torch; held-out text, where there is any, through the original and the result side by side."""
    job, source, model = prepared.job, prepared.source, prepared.source.model
    _set_threads(job.threads)
    blocks = Blocks(source.directory, model, sources, CPU)
    floats = fallback.choose(model, scales.layers, job.fallback_budget) if scales and job.fallback_budget else {}
    if scales and prepared.scheme.activations == "tensor":
        floats |= fallback.unscaled(model, scales.layers)
    fallback.check_some_left(model, floats)
    strength = job.strength if job.scale_input is not None else None
    target = Target(prepared.scheme, prepared.format, prepared.scale_dtype, floats, strength)
    streams = _streams(blocks, held_out_BT, journal)

    def make(number: int, parts: Mapping[str, Part]) -> tuple[dict[str, Any], dict[str, Any]]:
        layer = blocks.load(number - 1)
        digests = {name: blocks.digests[name] for name in parts}
        check_source(digests, promised, source)
        own: LayerScales | None = None
        if scales is not None:
            own = scales.layers[number - 1]
            check_layer(layer_digest(digests, list(parts)), own, number - 1, job.scale_input or "the journal")
        made = apply_layer(blocks, layer, own, target, streams)
        entries = shards.write(number, made.pieces)
        states = {} if streams is None else {name: getattr(streams, name).numpy() for name in STREAMS}
        return {"entries": [list(entry) for entry in entries], "sources": digests, "layer": made.facts}, states

    written = write_units(source, sources, shards, journal, promised, make, reporter)
    whole = None
    if streams is not None:
        assert held_out_BT is not None
        reporter.start("comparing predictions", 1, "models")
        whole = whole_model(blocks, streams.original, streams.quantized, held_out_BT)
        _check_predictions(whole, prepared)
        reporter.advance(1)
        reporter.finish()
    return Outcome(written, whole, floats)


def _check_predictions(whole: dict[str, Any], prepared: Prepared) -> None:
    """Refuse an original whose layers are sound and whose predictions are not: its last weights are damaged."""
    if not math.isfinite(whole["perplexity_original"]):
        model = prepared.source.model
        last = [model.part(role).name for role in (FINAL_NORM, HEAD if model.has(HEAD) else EMBEDDING)]
        raise InputError(
            f"the predictions of {prepared.source.directory} itself are not finite on this text: {' or '.join(last)} "
            "has NaN or infinite values",
            code="quantize.not-finite",
            repair="is the model whole? `ferry verify` tells; is its dtype wide enough? `ferry inspect` tells",
        )


def _streams(blocks: Blocks, held_out_BT: npt.NDArray[np.int32] | None, journal: Journal) -> Streams | None:
    if held_out_BT is None:
        return None
    if journal.has_states:
        states = journal.states()
        return Streams(torch.from_numpy(states["original"]), torch.from_numpy(states["quantized"]))
    embedded = blocks.embed(held_out_BT)
    return Streams(embedded, embedded.clone())


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
