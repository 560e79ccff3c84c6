"""What a finished pass 2 is turned into: config, proof, page, manifest, and the result of the verb."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferry.core.dtypes import num_bytes
from ferry.core.layout import Slot, whole
from ferry.core.manifest import MANIFEST_NAME, Manifest, Node, TensorDigest
from ferry.core.progress import Reporter
from ferry.core.quantized import Scheme
from ferry.core.verb import Result
from ferry.data.windows import Windows
from ferry.formats.fingerprint import file_digests, manifest_of, tensor_digests
from ferry.formats.hf import INDEX, as_part
from ferry.formats.quantized import description, with_description
from ferry.recipes.engines import verdicts_here
from ferry.verbs.quantize.config import QuantizeConfig
from ferry.verbs.quantize.page import page
from ferry.verbs.quantize.plan import NAMES, Prepared
from ferry.verbs.quantize.rewriting import small_json
from ferry.verbs.quantize.shards import Shards, digests_of
from ferry.verbs.quantize.writing import Written

if TYPE_CHECKING:
    from ferry.verbs.quantize.scales import Scales

PROOF, PAGE = "quantization.json", "quantization.html"


@dataclass(frozen=True)
class Outcome:
    """What pass 2 wrote, what the whole model predicts, and which modules stay float by the budget."""

    written: Written
    whole: dict[str, Any] | None
    floats: dict[str, str]


def finish(
    prepared: Prepared, config: QuantizeConfig, outcome: Outcome, shards: Shards, directory: Path,
    text: Windows | None, scales: Scales | None, reporter: Reporter,
) -> Result:  # fmt: skip
    """Write everything beside the weights, the manifest last, and return the result."""
    job, source, written = prepared.job, prepared.source, outcome.written
    assert job.output is not None
    headers = shards.finish(written.entries)
    schemes = {
        linear["name"]: prepared.scheme
        for layer in written.layers
        for linear in layer["linears"]
        if linear["scheme"] != "float"
    }
    _write_assets(prepared, schemes, [entry.name for entry in written.entries], directory)
    parent = _parent(prepared, written)
    quantized_bytes = sum(header.file_bytes for header in headers.values())
    proof = _proof(prepared, outcome, text, scales, parent.model_sha256, quantized_bytes)
    (directory / PROOF).write_bytes(small_json(proof))
    (directory / PAGE).write_text(page(proof), encoding="utf-8")
    slots = [
        Slot(directory / file, entry.start, entry.dtype, whole(as_part(name, entry.shape)), name)
        for file, header in headers.items()
        for name, entry in header.tensors.items()
    ]
    promised = manifest_of(source.directory)
    lineage = promised.ancestry() if promised else (parent,)
    cost = _cost()
    changes = _changes(prepared, schemes, sum(layer.get("factors", 0) for layer in written.layers))
    summary = f"{NAMES[job.method]} {prepared.scheme.name} as {job.format}"
    short = {key: value for key, value in proof.items() if key not in ("layers", "experts")}
    manifest = Manifest(
        kind="quantized-model",
        name=job.output.name,
        verb="quantize",
        summary=f"{source.directory.resolve().name} -> {summary}",
        config=_settings(config),
        tensors=dict(sorted(digests_of(written.entries).items())),
        files=file_digests(directory, slots),
        details={"family": source.model.family.name, "method": job.method, "scheme": prepared.scheme.name,
                 "format": job.format, "recipe_sha256": proof["recipe_sha256"]},
        changes=changes,
        proofs=({"check": "quantization", **short, "cost": cost},),
        parents=(lineage[0].id,),
        lineage=lineage,
    )  # fmt: skip
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    for limit in proof["limits"]:
        reporter.event("limit", **limit)
    measured = outcome.whole or {}
    keys = ("kl", "top1", "perplexity", "perplexity_original", "perplexity_ratio")
    return {
        "action": "quantize",
        "artifact": str(job.output),
        "method": job.method,
        "scheme": prepared.scheme.name,
        "format": job.format,
        "passed": proof["passed"],
        **{key: measured.get(key) for key in keys},
        "bytes": quantized_bytes,
        "bytes_original": proof["bytes"]["original"],
        "page": str(job.output / PAGE),
        "model_sha256": manifest.model_sha256,
        "source_model_sha256": parent.model_sha256,
        "scales": str(job.scale_output) if job.scale_output else None,
        "cost": cost,
        "proof": proof,
        "choices": [*prepared.choices, *(text.choices if text else ())],
        "changes": list(changes),
    }


def _write_assets(prepared: Prepared, schemes: Mapping[str, Scheme], tensors: list[str], directory: Path) -> None:
    source = prepared.source
    said = description(prepared.format, source.model, schemes, tensors)
    for name, path in source.assets.files.items():
        if name not in (INDEX, "config.json", PROOF, PAGE):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)
    for name, data in {"config.json": small_json(with_description(source.model.config, said)), **said.files}.items():
        (directory / name).write_bytes(data)


def _parent(prepared: Prepared, written: Written) -> Node:
    """Return the node of the source; without a manifest, all that is known of it is what was read."""
    source = prepared.source
    promised = manifest_of(source.directory)
    if promised is not None:
        return promised.node()
    read = Manifest(kind=source.format, name="", verb="", summary="", tensors=_source_digests(prepared, written))
    name = source.directory.resolve().name
    return Node(read.id, source.format, name, "", "came without a manifest", "", read.model_sha256)


def _source_digests(prepared: Prepared, written: Written) -> dict[str, TensorDigest]:
    return tensor_digests(prepared.source, written.sources)


def _proof(
    prepared: Prepared, outcome: Outcome, text: Windows | None, scales: Scales | None, source_sha256: str,
    quantized_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    job, source = prepared.job, prepared.source
    about = scales.about if scales else None
    calibration = None
    if about is not None:
        calibration = {"name": about["text"], "sha256": about["text_sha256"], "windows": about["windows"],
                       "window_tokens": about["window_tokens"]}  # fmt: skip
    evaluation = None
    if text is not None and job.evaluate:
        windows, length = text.held_out_BT.shape
        evaluation = {"name": text.held_out_name, "sha256": text.held_out_sha256, "windows": windows,
                      "window_tokens": length}  # fmt: skip
    layers = [dict(layer) for layer in outcome.written.layers]
    experts = []
    for number, found in enumerate(scales.layers if scales else ()):
        # Pass 2 checked the factors that were applied; without text, what pass 1 saw stands.
        if layers[number]["self_check_nmse"] is None:
            layers[number]["self_check_nmse"] = found.facts["self_check_nmse"]
        experts += [{"layer": number, **expert} for expert in found.facts["experts"]]
    limits = _limits(outcome.whole, job.limits._asdict())
    original_bytes = sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in source.specs().values())
    original_bytes += sum(len(data) for _, _, data in source.carried.values())
    recipe = {"method": job.method, "scheme": prepared.scheme._asdict(), "strength": job.strength, "format": job.format,
              "scale_dtype": prepared.scale_dtype, "fallback_budget": job.fallback_budget, "calibration": calibration,
              "scales": scales.sha256 if scales else ""}  # fmt: skip
    verdicts = verdicts_here(job.format, prepared.scheme.name, prepared.scheme.activations)
    return {
        "method": job.method,
        "scheme": prepared.scheme.name,
        "format": job.format,
        "model": source.directory.resolve().name,
        "family": source.model.family.name,
        "source_model_sha256": source_sha256,
        "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "calibration": calibration,
        "evaluation": evaluation,
        "layers": layers,
        "whole": outcome.whole,
        "experts": experts,
        "limits": limits,
        "passed": all(limit["passed"] for limit in limits),
        "bytes": {
            "original": original_bytes,
            "quantized": quantized_bytes,
        },
        "engines": [
            {"engine": item.engine, "condition": item.condition, "runs": item.runs, "note": item.note}
            for item in verdicts
        ],
    }


def _limits(whole: Mapping[str, Any] | None, limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return every limit with what was measured; top-1 agreement must reach its limit, the others stay below."""
    if whole is None:
        return []
    found = []
    for key, limit in limits.items():
        name = key.partition("_")[2]
        value = whole[name]
        passed = bool(value >= limit if key.startswith("min") else value <= limit)
        found.append({"name": name, "value": value, "limit": limit, "passed": passed})
    return found


def _changes(prepared: Prepared, schemes: Mapping[str, Scheme], moved: int) -> tuple[str, ...]:
    """Declare what is not the source's any more."""
    number = len(schemes)
    changes = [f"{number} weights rounded to {prepared.scheme.name} ({prepared.format.name})"]
    if moved:
        changes.append(f"{moved} sets of smoothing factors folded into norms and weights")
    return tuple(changes)


def _settings(config: QuantizeConfig) -> dict[str, Any]:
    """Return the options that were given, without the places of files."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    for key in ("model", "output", "evaluation", "scale_input", "scale_output"):
        if settings.get(key):
            settings[key] = Path(settings[key]).name
    if settings.get("text", {}).get("chat_template"):
        settings["text"]["chat_template"] = Path(settings["text"]["chat_template"]).name
    if settings.get("data"):
        settings["data"] = [Path(item).name for item in settings["data"]]
    return settings


def _cost() -> dict[str, Any]:
    """Return what this process and its children used so far."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_s": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 1),
        "peak_rss_bytes": max(own.ru_maxrss, children.ru_maxrss) * 1024,
    }
