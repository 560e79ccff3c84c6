"""The `adapter_config.json` of a LoRA adapter, read strictly.

A key that is set is part of the formula W + scale * B @ A, or harmless (how training was started or placed), or more
than plain LoRA. The last, and any key that is not known, is refused by name: an adapter that is half understood merges
into a wrong model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ferry.core.errors import InputError

CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
Number = TypeVar("Number", int, float)

_OWN_KEYS = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "base_model_name_or_path", "task_type", "bias", "fan_in_fan_out", "init_lora_weights", "modules_to_save",
)  # fmt: skip
_REFUSED_KEYS = {
    "modules_to_save": "whole modules trained beside LoRA", "trainable_token_indices": "trained token rows",
    "target_parameters": "LoRA on bare parameters, such as fused experts", "use_dora": "DoRA", "use_qalora": "QA-LoRA",
    "lora_bias": "a bias in B", "alora_invocation_tokens": "LoRA that is active on some tokens only",
    "layer_replication": "repeated layers", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which truncates the base weight", "monteclora_config": "sampled weights",
}  # fmt: skip
"""Keys that add something to the formula when they are set."""
_HARMLESS_KEYS = frozenset((
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config",
))  # fmt: skip
"""Keys that say how an adapter was started, trained or placed, and nothing about what its tensors mean."""
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weight as it is."""


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says of a plain LoRA adapter.

    `targets` are module names or their ends (`q_proj`), or one regular expression for the whole name. The patterns map
    regular expressions for the end of a module name to another rank or alpha; the first that matches counts.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    base_model_name_or_path: str = ""
    task_type: str = "CAUSAL_LM"
    others: Mapping[str, Any] = field(default_factory=dict)
    """Harmless keys, as they were read."""

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale(self, module: str) -> float:
        """Return the factor of B @ A: alpha / rank, or alpha / sqrt(rank) where ranks are stabilised."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_target(self, module: str) -> bool:
        if isinstance(self.targets, str):
            return self.targets == ALL_LINEAR or re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)

    def to_json(self) -> dict[str, Any]:
        """Return the keys as PEFT writes them."""
        return dict(self.others) | {
            "peft_type": "LORA", "task_type": self.task_type or None, "r": self.rank, "lora_alpha": self.alpha,
            "lora_dropout": self.dropout, "use_rslora": self.use_rslora, "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern), "bias": "none", "fan_in_fan_out": False,
            "modules_to_save": None, "init_lora_weights": True, "inference_mode": True,
            "base_model_name_or_path": self.base_model_name_or_path or None,
            "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets),
        }  # fmt: skip


def read_config(path: Path) -> AdapterConfig:
    """Return an `adapter_config.json`; raise InputError naming the key that makes it more than plain LoRA."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no LoRA adapter: it has no {CONFIG}", code="lora.no-config") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", code="lora.config") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object", code="lora.config")
    _refuse_other_methods(document, path)
    own = _typed(document, path)
    others = {key: value for key, value in document.items() if key not in _OWN_KEYS and key not in _REFUSED_KEYS}
    return AdapterConfig(**own, others=others)


def _by_pattern(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first pattern that matches the end of a module name, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _refuse_other_methods(document: Mapping[str, Any], path: Path) -> None:
    method = document.get("peft_type")
    if method != "LORA":
        raise _unsupported(path, f"has peft_type {method!r}, expected 'LORA'")
    for key, what in _REFUSED_KEYS.items():
        if document.get(key):
            raise _unsupported(path, f"has {key}: {what}")
    if document.get("bias", "none") != "none":
        raise _unsupported(path, f"has bias {document['bias']!r}: trained biases beside LoRA, expected 'none'")
    if document.get("fan_in_fan_out"):
        raise _unsupported(path, "has fan_in_fan_out: weights stored as [in, out], expected [out, in]")
    start = document.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise InputError(
            f"{path} has init_lora_weights {start!r}: its training may have begun by changing the base",
            code="lora.unsupported",
            repair="save it with PEFT's path_initial_model_for_weight_conversion: that makes it plain LoRA",
        )
    known = {*_OWN_KEYS, *_REFUSED_KEYS, *_HARMLESS_KEYS}
    unknown = sorted(key for key, value in document.items() if key not in known and value)
    if unknown:
        raise InputError(
            f"{path} sets {', '.join(unknown)}, which Ferry does not know and which may change what the tensors mean",
            code="lora.unknown-key",
            repair="merge it with the program that made it",
        )


def _unsupported(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}", code="lora.unsupported", repair="Ferry reads plain LoRA; merge it with PEFT")


def _typed(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of an AdapterConfig, or raise InputError naming the key that is missing or of a wrong type."""
    ranks, alphas = document.get("rank_pattern") or {}, document.get("alpha_pattern") or {}
    targets, dropout = document.get("target_modules"), document.get("lora_dropout", 0.0)
    checks = {
        "r": (document.get("r"), _is_rank, "a positive integer"),
        "lora_alpha": (document.get("lora_alpha"), _is_number, "a number"),
        "lora_dropout": (dropout, lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
        "target_modules": (targets, _is_targets, "names of modules"),
        "rank_pattern": (ranks, lambda value: _maps_to(_is_rank, value), "a mapping to positive integers"),
        "alpha_pattern": (alphas, lambda value: _maps_to(_is_number, value), "a mapping to numbers"),
    }
    for key, (value, is_right, expected) in checks.items():
        if not is_right(value):
            raise InputError(f"{path}: {key} is {value!r}, expected {expected}", code="lora.config")
    for pattern in (*ranks, *alphas, *([targets] if isinstance(targets, str) else [])):
        _check_pattern(pattern, path)
    return {
        "rank": document["r"], "alpha": document["lora_alpha"], "dropout": dropout, "rank_pattern": ranks,
        "alpha_pattern": alphas, "targets": targets if isinstance(targets, str) else tuple(targets or ()),
        "use_rslora": bool(document.get("use_rslora")), "task_type": str(document.get("task_type") or ""),
        "base_model_name_or_path": str(document.get("base_model_name_or_path") or ""),
    }  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_targets(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return bool(value) and (is_list or isinstance(value, str))


def _maps_to(is_right: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, dict) and all(is_right(item) for item in value.values())


def _check_pattern(pattern: str, path: Path) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{path}: {pattern!r} is no regular expression: {error}", code="lora.config") from None
