"""Proofs of quantized models, as `ferry quantize` writes them, with chosen numbers."""

from __future__ import annotations

from typing import Any

GROUPS = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "v->o",
    "mlp.gate_proj": "gate/up",
    "mlp.up_proj": "gate/up",
    "mlp.down_proj": "up->down",
}
LIMITS = {"kl": 0.05, "top1": 0.88, "perplexity_ratio": 1.03}


def proof(num_layers: int = 3, num_experts: int = 0, **changes: Any) -> dict[str, Any]:
    """Return the proof of a good model; `changes` replace whole keys."""
    whole = {
        "tokens": 2044, "perplexity_original": 24.33, "perplexity": 24.45, "perplexity_ratio": 1.005, "kl": 0.0108,
        "kl_by_window": [0.0089, 0.0114, 0.0117, 0.0112], "kl_p99": 0.0812, "top1": 0.935,
    }  # fmt: skip
    return {
        "method": "smoothquant", "scheme": "W8A8", "format": "compressed-tensors", "model": "smol", "family": "llama",
        "source_model_sha256": "5" * 64, "recipe_sha256": "6" * 64,
        "calibration": {"name": "the manual", "sha256": "7" * 64, "windows": 16, "window_tokens": 512},
        "evaluation": {"name": "the novel", "sha256": "8" * 64, "windows": 4, "window_tokens": 511},
        "layers": [layer(number, num_experts) for number in range(num_layers)],
        "whole": whole,
        "experts": [
            {"layer": number, "expert": expert, "tokens": 100 * expert, "fell_back": expert == 0}
            for number in range(num_layers)
            for expert in range(num_experts)
        ],
        "limits": [limit(name, whole[name]) for name in LIMITS],
        "passed": True, "bytes": {"original": 269_060_552, "quantized": 163_000_000},
        "engines": [
            {"engine": "vllm-cpu", "condition": "AVX2", "runs": True, "note": "through oneDNN"},
            {"engine": "vllm-ascend", "condition": "linear", "runs": None, "note": "read only"},
        ],
        **changes,
    }  # fmt: skip


def limit(name: str, value: Any) -> dict[str, Any]:
    """Return a limit with its verdict."""
    passed = value >= LIMITS[name] if name == "top1" else value <= LIMITS[name]
    return {"name": name, "value": value, "limit": LIMITS[name], "passed": passed}


def layer(number: int, num_experts: int = 0) -> dict[str, Any]:
    """Return a layer whose down_proj has the largest error."""
    groups = {name: group for name, group in GROUPS.items() if not num_experts or "mlp" not in name}
    for expert in range(num_experts):
        groups |= {name.replace("mlp", f"mlp.experts.{expert}"): GROUPS[name] for name in GROUPS if "mlp" in name}
    linears = [
        {"name": f"model.layers.{number}.{name}", "scheme": "W8A8", "group": group, "strength": 0.7,
         "nmse": 2.5e-3 if "down" in name else 1.5e-4, "cosine": 0.99925, "weight_nmse": 3.5e-5, "reason": ""}
        for name, group in groups.items()
    ]  # fmt: skip
    nmse = (number + 1) * 1.1e-5
    return {"layer": number, "nmse": nmse, "cosine": 0.999991, "self_check_nmse": 1.7e-13, "linears": linears}


def data_free(num_layers: int = 3) -> dict[str, Any]:
    """Return the proof of a model that never saw text."""
    layers = [layer(number) for number in range(num_layers)]
    for one in layers:
        one |= {"nmse": None, "cosine": None, "self_check_nmse": None}
        for linear in one["linears"]:
            linear |= {"nmse": None, "cosine": None, "group": "", "strength": None}
    return proof(method="rtn", layers=layers, whole=None, calibration=None, evaluation=None, limits=[])


def broken() -> dict[str, Any]:
    """Return the proof of a model whose divergence is above its limit."""
    whole = {**proof()["whole"], "kl": 0.31}
    return proof(whole=whole, limits=[limit(name, whole[name]) for name in LIMITS], passed=False)
