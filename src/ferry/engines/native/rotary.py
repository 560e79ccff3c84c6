"""Angles of rotary positions, as transformers computes them: plain, linear, Llama 3.1's and YaRN's scaling.

In float64 and rounded once where that is the more exact way; tables are float32. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
"""The kinds that are computed here, and what a config.json must say for each."""


class Tables(NamedTuple):
    """Cosines and sines [max_positions, rotary_dim / 2]."""

    cosines: Float32
    sines: Float32


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a config.json, old keys and new: `rope_type`, `rope_theta` and the type's own."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta"))
    found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if found.get("partial_rotary_factor") is None:
        found["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1.0
    return found


def is_known(config: Mapping[str, Any]) -> bool:
    """Say whether `tables` can make the angles of a config: nothing is assumed that the config does not say."""
    found = parameters(config)
    is_nested = any(isinstance(value, Mapping) for value in found.values())
    is_whole = found["partial_rotary_factor"] == 1.0 and found["rope_theta"] is not None
    needed = NEEDED.get(found["rope_type"])
    return not is_nested and is_whole and needed is not None and all(found.get(key) is not None for key in needed)


def tables(config: Mapping[str, Any], head_dim: int, max_positions: int) -> Tables:
    """Return the angles of every position."""
    found = parameters(config)
    frequencies, factor = _frequencies(found, head_dim, config)
    angles = np.arange(max_positions, dtype=np.float32)[:, None] * frequencies
    wide = angles.astype(np.float64)
    return Tables(*((turn(wide) * factor).astype(np.float32) for turn in (np.cos, np.sin)))


def _frequencies(found: Mapping[str, Any], dim: int, config: Mapping[str, Any]) -> tuple[Float32, float]:
    kind = found["rope_type"]
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(float(found["rope_theta"]), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if kind == "linear":
        return plain / np.float32(found["factor"]), 1.0
    if kind == "llama3":
        return _llama3(found, plain), 1.0
    if kind == "yarn":
        return _yarn(found, powers, dim, config)
    return plain, 1.0


def _llama3(found: Mapping[str, Any], plain: Float32) -> Float32:
    """Long waves are stretched, short ones kept, those between interpolated."""
    factor, low, high = (np.float32(found[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old = float(found["original_max_position_embeddings"])
    waves = np.float32(2 * math.pi) / plain
    stretched = np.where(waves > np.float32(old / float(low)), plain / factor, plain)
    smooth = (np.float32(old) / waves - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = (waves >= np.float32(old / float(high))) & (waves <= np.float32(old / float(low)))
    return np.where(is_between, between, stretched).astype(np.float32)


def _yarn(found: Mapping[str, Any], powers: Float32, dim: int, config: Mapping[str, Any]) -> tuple[Float32, float]:
    """YaRN (arXiv 2309.00071): interpolated where a wave turns seldom within the old context, kept where often."""
    factor, base = float(found["factor"]), float(found["rope_theta"])
    old = found.get("original_max_position_embeddings") or config["max_position_embeddings"]

    def turns(rotations: float) -> float:
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns(float(found.get("beta_fast") or 32)), turns(float(found.get("beta_slow") or 1))
    if found.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - ramp
    inner = (1 / (factor * powers.astype(np.float64))).astype(np.float32)
    outer = np.float32(1) / powers
    return (inner * (1 - kept) + outer * kept).astype(np.float32), _yarn_scale(found, factor)


def _yarn_scale(found: Mapping[str, Any], factor: float) -> float:
    """Return what cosines and sines are multiplied by."""

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    if found.get("mscale") and found.get("mscale_all_dim"):
        return scale(float(found["mscale"])) / scale(float(found["mscale_all_dim"]))
    return scale(1.0)
