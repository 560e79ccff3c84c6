"""AWQ as AutoAWQ's gemm kernels read it: 4-bit weights, transposed, eight neighbours of N in a 32-bit word.

MODULE.qweight  I32 [K, N / 8]          the word holds columns 0 2 4 6 1 3 5 7 of its eight, from the lowest nibble
MODULE.qzeros   I32 [K / group, N / 8]  in the same order
MODULE.scales   F16 [K / group, N]

There is always a zero point: a symmetric weight has 8 everywhere. Source: AutoAWQ `awq/modules/linear/gemm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.quantized import Integers, Scheme
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

NAME = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SCALE_DTYPE = "F16"


def _refuses(scheme: Scheme, rows: int, cols: int) -> str:
    if scheme.bits != 4 or scheme.activations or scheme.group <= 0:
        return f"awq holds 4-bit weights in groups (W4A16), not {scheme.name}"
    if cols % scheme.group:
        return f"groups of {scheme.group} do not divide the {cols} weights in a row"
    if rows % NIBBLES:
        return f"awq needs a multiple of {NIBBLES} rows, found {rows}"
    return ""


def _stored(module: str, rows: int, cols: int, scheme: Scheme, scale_dtype: str) -> dict[str, Typed]:
    """Return the tensors of a linear; their scales are F16 whatever dtype is asked for."""
    groups = cols // scheme.group
    return {
        f"{module}.qweight": ("I32", (cols, rows // NIBBLES)),
        f"{module}.qzeros": ("I32", (groups, rows // NIBBLES)),
        f"{module}.scales": (SCALE_DTYPE, (groups, rows)),
    }


def _encode(module: str, integers: Integers) -> dict[str, Stored]:
    assert integers.zeros is not None, "4-bit weights have zero points"
    name = f"{module}.scales"
    scales_GN = np.ascontiguousarray(integers.scales.T)
    return {
        f"{module}.qweight": of_integers(pack_nibbles(integers.values.T, ORDER), "I32"),
        f"{module}.qzeros": of_integers(pack_nibbles(integers.zeros.T, ORDER), "I32"),
        name: of_floats(scales_GN, SCALE_DTYPE, scales_GN.shape, name),
    }


def _decode(module: str, read: Read, scheme: Scheme) -> Integers:
    words, zeros, scales = (read(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
    return Integers(
        scheme,
        _columns(words),
        np.ascontiguousarray(floats_of(scales, scales.shape, f"{module}.scales").T),
        scales.dtype,
        _columns(zeros),
    )


def _columns(stored: Stored) -> Any:
    """Return integers [N, ...] of words [..., N / 8]."""
    return np.ascontiguousarray(unpack_nibbles(stored.data.view("<i4").reshape(stored.shape), ORDER).T)


def _describe(schemes: Mapping[str, Scheme], float_modules: Sequence[str], tensors: Sequence[str]) -> Description:
    (group,) = {scheme.group for scheme in schemes.values()}
    config = {
        "quant_method": NAME,
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(float_modules),
    }
    return Description(config, {})


def _declared(directory: Path, config: Mapping[str, Any]) -> Declared:
    quantization = config["quantization_config"]
    bits = quantization.get("bits", quantization.get("w_bit"))
    group = quantization.get("group_size", quantization.get("q_group_size"))
    version = str(quantization.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not isinstance(group, int) or group <= 0 or not quantization.get("zero_point"):
        found = f"bits {bits}, group size {group}, version {version}, zero point {quantization.get('zero_point')}"
        raise refuse_layout(directory, found, NAME)
    kept = tuple(quantization.get("modules_to_not_convert") or ())
    return Declared(Scheme(4, group, False, ""), lambda module: not any(part in module for part in kept))


FORMAT = Format(
    NAME, ("scales", "qweight", "qzeros"), _refuses, _stored, _encode, _decode, _describe, _declared, SCALE_DTYPE
)
