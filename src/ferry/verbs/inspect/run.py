"""`ferry inspect`: sizes, layout, tensors and what can be done with them, from headers alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ferry.core import family as f
from ferry.core.dtypes import num_bytes, num_items
from ferry.core.family import Model
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.families.registry import model_of
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.fingerprint import manifest_of
from ferry.formats.gguf import gguf_plan
from ferry.formats.hf import missing_assets
from ferry.formats.opening import open_checkpoint, sniff
from ferry.formats.peft import is_adapter, open_adapter
from ferry.verbs.inspect.config import InspectConfig
from ferry.verbs.inspect.quantized import inspect_quantized
from ferry.verbs.inspect.summary import summary

TOKENS_PER_PARAMETER = (1, 5, 20, 100, 200, 1000)
"""20 is compute-optimal after Hoffmann et al. 2022 (arXiv 2203.15556); recent small models use hundreds and more."""
GROUPS = {
    "embedding": (f.EMBEDDING,),
    "attention": (
        f.QUERY, f.KEY, f.VALUE, f.QUERY_BIAS, f.KEY_BIAS, f.VALUE_BIAS, f.QUERY_NORM, f.KEY_NORM, f.ATTENTION_OUT
    ),
    "mlp": f.DENSE_ROLES,
    "router": (f.ROUTER,),
    "experts": f.EXPERT_ROLES,
    "norms": (f.ATTENTION_NORM, f.MLP_NORM, f.FINAL_NORM),
    "head": (f.HEAD,),
}  # fmt: skip


def run(config: InspectConfig, reporter: Reporter) -> Result:
    """Return what the path holds, as JSON values."""
    kind = sniff(config.path)
    if kind == "gguf":
        return _inspect_gguf(config)
    if kind == "quantized":
        return inspect_quantized(config)
    if is_adapter(config.path):
        return _inspect_adapter(config.path)
    checkpoint = open_checkpoint(config.path, config.hf_assets)
    specs = checkpoint.specs()
    shapes = checkpoint.model.canonical()
    typed = {name: (specs[name].dtype, shape) for name, shape in shapes.items()}
    found = _describe(checkpoint.model, typed)
    manifest = manifest_of(checkpoint.directory)
    return {
        "path": str(config.path),
        "format": checkpoint.format,
        **found,
        "weight_files": _weight_files(checkpoint),
        "layout": checkpoint.layout,
        "carried": sorted(checkpoint.carried),
        "assets": sorted(checkpoint.assets.files),
        "missing": missing_assets(checkpoint.assets),
        "manifest": summary(manifest) if manifest else None,
        "tensors": _tensor_table(checkpoint, typed) if config.tensors else [],
    }


def _inspect_adapter(path: Path) -> Result:
    """Return what a LoRA adapter is: its settings, its modules, the model it belongs to."""
    adapter = open_adapter(path)
    shapes = [stored.shape for pair in adapter.modules.values() for stored in pair]
    return {
        "path": str(path),
        "format": "adapter",
        "rank": adapter.config.rank,
        "alpha": adapter.config.alpha,
        "targets": list(adapter.config.targets)
        if not isinstance(adapter.config.targets, str)
        else adapter.config.targets,
        "num_modules": len(adapter.modules),
        "parameters": sum(num_items(shape) for shape in shapes),
        "base": adapter.base_name,
        "base_model_sha256": adapter.base_sha256,
        "manifest": summary(adapter.manifest) if adapter.manifest else None,
    }


def _describe(model: Model, typed: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Return what follows from the family, the sizes and the tensors."""
    parameters = sum(num_items(shape) for _, shape in typed.values())
    dtypes: dict[str, int] = defaultdict(int)
    groups: dict[str, int] = defaultdict(int)
    group_of = {role: group for group, roles in GROUPS.items() for role in roles}
    for name, (dtype, shape) in typed.items():
        dtypes[dtype] += num_items(shape)
        groups[group_of[model.role_of(name)]] += num_items(shape)
    active = parameters - _idle(model)
    return {
        "family": model.family.name,
        "architecture": (model.config.get("architectures") or [""])[0],
        "sizes": asdict(model.dims),
        "num_tensors": len(typed),
        "parameters": parameters,
        "active_parameters": active,
        "bytes": sum(num_bytes(dtype, shape) for dtype, shape in typed.values()),
        "dtypes": dict(dtypes),
        "parameters_by_group": {group: groups[group] for group in GROUPS if group in groups},
        "legal_tp": model.legal_tp(),
        "legal_ep": model.legal_ep(),
        "legal_pp": [n for n in range(1, model.dims.num_layers + 1) if model.dims.num_layers % n == 0],
        "tokens_per_parameter": [
            {"ratio": ratio, "tokens": ratio * active, "training_flop": 6 * ratio * active * active}
            for ratio in TOKENS_PER_PARAMETER
        ],
    }


def _idle(model: Model) -> int:
    """Return the parameters that one token does not use: the experts it is not routed to."""
    dims = model.dims
    if not dims.num_experts:
        return 0
    moe_layers = sum(dims.is_moe(layer) for layer in range(dims.num_layers))
    expert = sum(rows * cols for rows, cols, _ in (model.size(role) for role in f.EXPERT_ROLES))
    return moe_layers * (dims.num_experts - dims.experts_per_token) * expert


def _weight_files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {"path": path.relative_to(checkpoint.directory).as_posix(), "bytes": path.stat().st_size}
        for path in checkpoint.payload_ranges()
    ]


def _tensor_table(checkpoint: Checkpoint, typed: dict[str, tuple[str, tuple[int, ...]]]) -> list[dict[str, Any]]:
    """Return the stored tensors: in a model directory each tensor, in shards each tensor of each rank."""
    return [
        {
            "name": slot.label,
            "dtype": slot.dtype,
            "shape": list(slot.local.shape),
            "file": slot.path.relative_to(checkpoint.directory).as_posix(),
            "from": sorted({piece.name for piece in slot.local.pieces}),
            "role": checkpoint.model.role_of(slot.label) if slot.label in typed else "",
        }
        for slot in checkpoint.slots
    ]


def _inspect_gguf(config: InspectConfig) -> Result:
    plan = gguf_plan(config.path)
    typed = {name: (dtype, shape) for name, dtype, shape in plan.tensors}
    model = model_of(plan.config, str(config.path))
    path: Path = config.path
    return {
        "path": str(path),
        "format": "gguf",
        **_describe(model, typed),
        "weight_files": [{"path": path.name, "bytes": path.stat().st_size}],
        "layout": {"source": plan.source},
        "carried": [],
        "assets": sorted(plan.assets),
        "missing": [],
        "manifest": None,
        "tensors": [{"name": name, "dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in typed.items()]
        if config.tensors
        else [],
    }
