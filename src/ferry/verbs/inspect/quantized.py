"""`ferry inspect` of quantized weights: format, schemes, sizes, the engines that run it, and what was proven of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from ferry.core.dtypes import num_bytes, num_items
from ferry.core.manifest import Manifest
from ferry.core.quantized import PER_ROW, PER_TENSOR, Scheme
from ferry.core.verb import Result
from ferry.formats.fingerprint import manifest_of
from ferry.formats.hf import missing_assets
from ferry.formats.quantized import LINEAR_ROLES, WEIGHT, QuantizedCheckpoint, open_quantized
from ferry.recipes.engines import verdicts_here
from ferry.verbs.inspect.config import InspectConfig
from ferry.verbs.inspect.summary import summary

PROVEN = ("kl", "kl_p99", "top1", "perplexity_original", "perplexity", "perplexity_ratio", "tokens")


def inspect_quantized(config: InspectConfig) -> Result:
    """Return what a directory of quantized weights is, as JSON values."""
    checkpoint = open_quantized(config.path)
    model, manifest = checkpoint.model, manifest_of(config.path)
    shapes = model.canonical()
    quantized_items = sum(num_items(checkpoint.shape(module)) for module in checkpoint.schemes)
    quantized_bytes = sum(
        num_bytes(dtype, shape)
        for module in checkpoint.schemes
        for dtype, shape in checkpoint.tensors_of(module).values()
    )
    stored_bytes = sum(num_bytes(item.dtype, item.shape) for item in checkpoint.found.values())
    return {
        "path": str(config.path),
        "format": "quantized",
        "stored_as": checkpoint.format.name,
        "family": model.family.name,
        "architecture": (model.config.get("architectures") or [""])[0],
        "sizes": asdict(model.dims),
        "parameters": sum(num_items(shape) for shape in shapes.values()),
        "quantized_parameters": quantized_items,
        "schemes": _schemes(checkpoint),
        "quantized_linears": len(checkpoint.schemes),
        "float_linears": [
            name.removesuffix(WEIGHT)
            for name in shapes
            if model.role_of(name) in LINEAR_ROLES and name.removesuffix(WEIGHT) not in checkpoint.schemes
        ],
        "bytes": stored_bytes,
        "quantized_bytes": quantized_bytes,
        "bits_per_weight": 8 * quantized_bytes / max(1, quantized_items),
        "engines": _engines(checkpoint),
        "proof": _proof(manifest),
        "weight_files": [
            {"path": path.relative_to(config.path).as_posix(), "bytes": path.stat().st_size}
            for path in checkpoint.payload_ranges()
        ],
        "num_tensors": len(checkpoint.found),
        "assets": sorted(checkpoint.assets.files),
        "missing": missing_assets(checkpoint.assets),
        "manifest": summary(manifest) if manifest else None,
        "tensors": _tensors(checkpoint) if config.tensors else [],
    }


def _schemes(checkpoint: QuantizedCheckpoint) -> list[dict[str, Any]]:
    counts = Counter(checkpoint.schemes.values())
    return [{"name": scheme.name, **_described(scheme), "linears": count} for scheme, count in counts.items()]


def _described(scheme: Scheme) -> dict[str, Any]:
    scales = {PER_ROW: "row", PER_TENSOR: "tensor"}.get(scheme.group, f"group of {scheme.group}")
    return {
        "bits": scheme.bits,
        "scale_for_each": scales,
        "symmetric": scheme.symmetric,
        "activations": scheme.activations,
    }


def _engines(checkpoint: QuantizedCheckpoint) -> list[dict[str, Any]]:
    """Return what is known of engines, for each scheme that occurs."""
    kinds = dict.fromkeys((scheme.name, scheme.activations) for scheme in checkpoint.schemes.values())
    return [
        verdict._asdict()
        for name, activations in kinds
        for verdict in verdicts_here(checkpoint.format.name, name, activations)
    ]


def _proof(manifest: Manifest | None) -> dict[str, Any] | None:
    """Return the numbers of the manifest's comparison with the original, where there is one."""
    proofs = manifest.proofs if manifest is not None else ()
    for proof in proofs:
        whole = proof.get("whole")
        if whole:
            found = {key: whole[key] for key in PROVEN if key in whole}
            return found | {"method": proof.get("method", ""), "passed": proof.get("passed")}
    return None


def _tensors(checkpoint: QuantizedCheckpoint) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "dtype": item.dtype,
            "shape": list(item.shape),
            "file": item.path.relative_to(checkpoint.directory).as_posix(),
        }
        for name, item in checkpoint.found.items()
    ]
