"""compressed-tensors, the format of vLLM: W8A8 as `int-quantized`, W4A16 as `pack-quantized`.

W8A8   MODULE.weight             I8 [N, K]
       MODULE.weight_scale       [N, 1], or [1] for the whole tensor
       MODULE.input_scale        F32 [1], where activations have one scale
W4A16  MODULE.weight_packed      I32 [N, K / 8]      eight neighbours of K in a word, in their order
       MODULE.weight_scale       [N, K / group]
       MODULE.weight_zero_point  I32 [N / 8, K / group], packed along N; left out where weights are symmetric
       MODULE.weight_shape       I64 [2]

The library counts 4-bit integers from -8; plus 8, as it packs them, they are ours. Source: compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.errors import InputError
from ferry.core.quantized import INT4_MIDDLE, PER_ROW, PER_TENSOR, Activations, Integers, Scheme
from ferry.formats.quantized_format import (
    NIBBLES,
    Declared,
    Description,
    Format,
    Read,
    Stored,
    Typed,
    floats_of,
    of_floats,
    of_integers,
    pack_nibbles,
    refuse_layout,
    unpack_nibbles,
)

NAME = "compressed-tensors"
INT, PACKED = "int-quantized", "pack-quantized"
LINEAR = "Linear"
PATTERN = "re:"
UNREAD = ("kv_cache_scheme", "sparsity_config", "transform_config")
"""Parts of a configuration that change what is computed, and are refused where they say anything."""


def _refuses(scheme: Scheme, rows: int, cols: int) -> str:
    if scheme.bits == 8:
        if scheme.activations and scheme.symmetric and scheme.group in (PER_ROW, PER_TENSOR):
            return ""
        return f"compressed-tensors holds 8-bit weights with 8-bit activations and no groups, not {scheme.name}"
    if scheme.activations or scheme.group <= 0:
        return f"compressed-tensors holds 4-bit weights in groups (W4A16), not {scheme.name}"
    if cols % scheme.group:
        return f"groups of {scheme.group} do not divide the {cols} weights in a row"
    if cols % NIBBLES or (rows % NIBBLES and not scheme.symmetric):
        return f"4-bit weights are packed by {NIBBLES}, found [{rows}, {cols}]"
    return ""


def _stored(module: str, rows: int, cols: int, scheme: Scheme, scale_dtype: str) -> dict[str, Typed]:
    scales = scheme.scales_shape(rows, cols)
    if scheme.bits == 8:
        found: dict[str, Typed] = {f"{module}.weight": ("I8", (rows, cols))}
        found[f"{module}.weight_scale"] = (scale_dtype, (1,) if scheme.group == PER_TENSOR else scales)
        return found | ({f"{module}.input_scale": ("F32", (1,))} if scheme.activations == "tensor" else {})
    found = {
        f"{module}.weight_packed": ("I32", (rows, cols // NIBBLES)),
        f"{module}.weight_scale": (scale_dtype, scales),
    }
    if not scheme.symmetric:
        found[f"{module}.weight_zero_point"] = ("I32", (rows // NIBBLES, scales[1]))
    return found | {f"{module}.weight_shape": ("I64", (2,))}


def _encode(module: str, integers: Integers) -> dict[str, Stored]:
    rows, cols = integers.shape
    scheme = integers.scheme
    found: dict[str, Stored] = {}
    for name, (dtype, shape) in _stored(module, rows, cols, scheme, integers.scale_dtype).items():
        part = name.rpartition(".")[2]
        if part == "weight":
            found[name] = of_integers(integers.values, dtype)
        elif part == "weight_packed":
            found[name] = of_integers(pack_nibbles(integers.values), dtype)
        elif part == "weight_scale":
            found[name] = of_floats(integers.scales, dtype, shape, name)
        elif part == "input_scale":
            assert integers.input_scale is not None, "static activations have a scale"
            scale = np.array([integers.input_scale], np.float32)
            assert scale[0] == integers.input_scale, "the scale that is used is the one that is stored"
            found[name] = of_floats(scale, dtype, shape, name)
        elif part == "weight_zero_point":
            assert integers.zeros is not None, "asymmetric weights have zero points"
            found[name] = of_integers(pack_nibbles(integers.zeros.T).T, dtype)
        else:
            found[name] = of_integers(np.array([rows, cols], "<i8"), dtype)
    return found


def _decode(module: str, read: Read, scheme: Scheme) -> Integers:
    scales = read(f"{module}.weight_scale")
    shape = (1, 1) if scheme.group == PER_TENSOR else scales.shape
    scales_NG = floats_of(scales, shape, f"{module}.weight_scale")
    if scheme.bits == 8:
        weight = read(f"{module}.weight")
        values = weight.data.view(np.int8).reshape(weight.shape)
        input_scale = None
        if scheme.activations == "tensor":
            name = f"{module}.input_scale"
            input_scale = float(floats_of(read(name), (1,), name)[0])
        return Integers(scheme, values, scales_NG, scales.dtype, None, input_scale)
    words = read(f"{module}.weight_packed")
    values = unpack_nibbles(words.data.view("<i4").reshape(words.shape))
    measured = tuple(read(f"{module}.weight_shape").data.view("<i8").tolist())
    if measured != values.shape:
        raise InputError(
            f"{module}.weight_shape says {list(measured)}, its weight has {list(values.shape)}",
            code="quantized.tensors",
            repair="the model is damaged: make it again",
        )
    if scheme.symmetric:
        zeros = np.full(scales_NG.shape, INT4_MIDDLE, np.int8)
    else:
        packed = read(f"{module}.weight_zero_point")
        zeros = np.ascontiguousarray(unpack_nibbles(packed.data.view("<i4").reshape(packed.shape).T).T)
    return Integers(scheme, values, scales_NG, scales.dtype, zeros)


def _describe(schemes: Mapping[str, Scheme], float_modules: Sequence[str], tensors: Sequence[str]) -> Description:
    (scheme,) = set(schemes.values())
    layout = INT if scheme.bits == 8 else PACKED
    strategy = {PER_ROW: "channel", PER_TENSOR: "tensor"}.get(scheme.group, "group")
    group_size = scheme.group if strategy == "group" else None
    activations = None
    if scheme.activations:
        activations = _numbers(8, scheme.activations, symmetric=True, dynamic=scheme.activations == "token")
    group = {
        "targets": [LINEAR],
        "weights": _numbers(scheme.bits, strategy, symmetric=scheme.symmetric, dynamic=False, group_size=group_size),
        "input_activations": activations,
        "output_activations": None,
        "format": layout,
    }
    config = {
        "quant_method": NAME,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(float_modules),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return Description(config, {})


def _numbers(
    bits: int, strategy: str, *, symmetric: bool, dynamic: bool, group_size: int | None = None
) -> dict[str, Any]:
    """Return how numbers are quantized, in the words of the library's `QuantizationArgs`."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


def _declared(directory: Path, config: Mapping[str, Any]) -> Declared:
    quantization = config["quantization_config"]
    groups = list((quantization.get("config_groups") or {}).values())
    said = [key for key in UNREAD if quantization.get(key)]
    if len(groups) != 1 or not isinstance(groups[0], Mapping) or said:
        raise refuse_layout(directory, ", ".join(said) or f"{len(groups)} groups of layers", NAME)
    (group,) = groups
    layout = str(group.get("format") or quantization.get("format"))
    scheme = _scheme(layout, group)
    if scheme is None:
        raise refuse_layout(directory, f"format {layout}, {_in_words(group)}", NAME)
    targets, ignored = tuple(group["targets"]), tuple(quantization.get("ignore") or ())

    def covers(module: str) -> bool:
        return _named(module, (*targets,)) and not _named(module, ignored)

    return Declared(scheme, covers)


def _scheme(layout: str, group: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme of a group of layers; None if it is not one of ours."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if weights.get("type") != "int" or weights.get("dynamic") or group.get("output_activations"):
        return None
    strategy, size, symmetric = weights.get("strategy"), weights.get("group_size"), bool(weights.get("symmetric"))
    if layout == PACKED and weights.get("num_bits") == 4 and inputs is None and strategy == "group" and size:
        return Scheme(4, int(size), symmetric, "")
    activations = _activations(inputs)
    if (
        layout == INT
        and weights.get("num_bits") == 8
        and strategy in ("channel", "tensor")
        and symmetric
        and activations
    ):
        return Scheme(8, PER_ROW if strategy == "channel" else PER_TENSOR, True, activations)
    return None


def _activations(inputs: Mapping[str, Any] | None) -> Activations:
    if not inputs or inputs.get("type") != "int" or inputs.get("num_bits") != 8 or not inputs.get("symmetric"):
        return ""
    if inputs.get("strategy") == "token" and inputs.get("dynamic") is True:
        return "token"
    return "tensor" if inputs.get("strategy") == "tensor" and not inputs.get("dynamic") else ""


def _in_words(group: Mapping[str, Any]) -> str:
    parts = {"weights": group.get("weights"), "activations": group.get("input_activations")}
    keys = ("num_bits", "type", "strategy", "dynamic")
    return "; ".join(f"{name} {[item.get(key) for key in keys]}" for name, item in parts.items() if item)


def _named(module: str, names: Sequence[str]) -> bool:
    """Say whether a list of names, patterns and classes means a linear layer."""
    return any(
        re.match(name.removeprefix(PATTERN), module) if name.startswith(PATTERN) else name in (module, LINEAR)
        for name in names
    )


FORMAT = Format(
    NAME,
    ("weight_scale", "weight_packed", "weight_zero_point", "weight_shape", "input_scale"),
    _refuses,
    _stored,
    _encode,
    _decode,
    _describe,
    _declared,
)
