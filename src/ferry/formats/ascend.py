"""AscendV1 W8A8_DYNAMIC: int8 weights with a scale for each row, as msModelSlim writes and vllm-ascend reads them.

MODULE.weight         I8 [N, K]
MODULE.weight_scale   F32 [N, 1]
MODULE.weight_offset  F32 [N, 1]    zeros: weights are symmetric

`quant_model_description.json` says what each tensor is: W8A8_DYNAMIC for all three, FLOAT for the others; config.json
has no `quantization_config`. Sources: msModelSlim `ascendv1.py`, vllm-ascend `modelslim_config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.errors import InputError
from ferry.core.quantized import PER_ROW, Integers, Scheme
from ferry.formats.quantized_format import (
    Declared,
    Description,
    Format,
    Read,
    Stored,
    Typed,
    floats_of,
    of_floats,
    of_integers,
    refuse_layout,
)

NAME = "ascend"
FILE = "quant_model_description.json"
KIND = "W8A8_DYNAMIC"
FLOAT = "FLOAT"
SCALE_DTYPE = "F32"
SCHEME = Scheme(8, PER_ROW, True, "token")


def _refuses(scheme: Scheme, rows: int, cols: int) -> str:
    if scheme == SCHEME:
        return ""
    found = scheme.name if scheme.bits != 8 or not scheme.activations else f"{scheme.name} with a scale for a tensor"
    return f"ascend holds W8A8 with a scale for each row and each token, not {found}"


def _stored(module: str, rows: int, cols: int, scheme: Scheme, scale_dtype: str) -> dict[str, Typed]:
    """Return the tensors of a linear; their scales are F32 whatever dtype is asked for."""
    return {
        f"{module}.weight": ("I8", (rows, cols)),
        f"{module}.weight_scale": (SCALE_DTYPE, (rows, 1)),
        f"{module}.weight_offset": (SCALE_DTYPE, (rows, 1)),
    }


def _encode(module: str, integers: Integers) -> dict[str, Stored]:
    scales, shape = integers.scales, integers.scales.shape
    return {
        f"{module}.weight": of_integers(integers.values, "I8"),
        f"{module}.weight_scale": of_floats(scales, SCALE_DTYPE, shape, module),
        f"{module}.weight_offset": of_floats(np.zeros_like(scales), SCALE_DTYPE, shape, module),
    }


def _decode(module: str, read: Read, scheme: Scheme) -> Integers:
    weight, scales, offset = (read(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_offset"))
    if floats_of(offset, offset.shape, f"{module}.weight_offset").any():
        raise InputError(f"{module}.weight_offset is not zero, expected symmetric weights", code="quantized.layout")
    values = weight.data.view(np.int8).reshape(weight.shape)
    return Integers(scheme, values, floats_of(scales, scales.shape, f"{module}.weight_scale"), scales.dtype)


def _describe(schemes: Mapping[str, Scheme], float_modules: Sequence[str], tensors: Sequence[str]) -> Description:
    quantized = {f"{module}.{part}" for module in schemes for part in ("weight", "weight_scale", "weight_offset")}
    # A tied head has no tensor, and is asked for nevertheless.
    names = [*tensors, *(f"{module}.weight" for module in float_modules if f"{module}.weight" not in tensors)]
    document: dict[str, Any] = {name: KIND if name in quantized else FLOAT for name in names}
    document |= {"version": "1.0.0", "model_quant_type": KIND, "metadata": {}, "group_size": 0, "optional": {}}
    return Description(None, {FILE: (json.dumps(document, indent=2) + "\n").encode()})


def _declared(directory: Path, config: Mapping[str, Any]) -> Declared:
    path = directory / FILE
    try:
        kinds: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        others = {kind for name, kind in kinds.items() if name.endswith(".weight")} - {KIND, FLOAT}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}", code="quantized.description") from None
    if others:
        raise refuse_layout(directory, f"{', '.join(sorted(map(str, others)))} tensors", NAME)
    return Declared(SCHEME, lambda module: kinds.get(f"{module}.weight") == KIND)


FORMAT = Format(
    NAME, ("weight_scale", "weight_offset"), _refuses, _stored, _encode, _decode, _describe, _declared, SCALE_DTYPE
)
