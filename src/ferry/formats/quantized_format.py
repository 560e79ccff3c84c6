"""What a file format of quantized weights has to say, and how 4-bit integers are packed into 32-bit words.

A format is a frozen value: names, dtypes and shapes of the tensors a linear layer is stored as, and the way from
`core.quantized.Integers` to them and back, bit for bit. The formats are `compressed_tensors`, `awq` and `ascend`;
`quantized` opens a directory in any of them. No file of a format knows another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.core.errors import InputError, LayoutError
from ferry.core.floats import FLOATS, Bytes, Float32, from_float32, to_float32
from ferry.core.quantized import Integers, Scheme, rounded

Typed = tuple[str, tuple[int, ...]]
"""The dtype (by its safetensors name) and the shape of a stored tensor."""
NIBBLES = 8
"""4-bit integers in a 32-bit word."""
NATURAL = tuple(range(NIBBLES))


class Stored(NamedTuple):
    """A tensor as it lies in a file: dtype, shape, and its bytes in one row."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes


Read = Callable[[str], Stored]
"""Returns a stored tensor by its full name."""


class Description(NamedTuple):
    """How a directory says what its tensors are: the `quantization_config` of config.json, and further files."""

    config: dict[str, Any] | None
    files: dict[str, bytes]


class Declared(NamedTuple):
    """What a directory says about itself: the scheme of its quantized linears, and which linears these are."""

    scheme: Scheme
    covers: Callable[[str], bool]


@dataclass(frozen=True)
class Format:
    """One way to write quantized linears down.

    refuses(scheme, rows, cols): "" or why this format cannot hold such a weight.
    stored(module, rows, cols, scheme, scale_dtype): the tensors of a linear, in the order they are written.
    encode(module, integers): these tensors with their bytes. decode(module, read, scheme): the exact inverse.
    describe(schemes, float_modules, tensors): what goes beside the weights. `float_modules` are linear layers that stay
    float, router and head among them; `tensors` the names of all tensors that are stored.
    declared(directory, config): what a directory says; refuses layouts that are not this one.
    """

    name: str
    marks: tuple[str, ...]
    """Endings of tensors that only a quantized linear has. That of its scales is the first."""
    refuses: Callable[[Scheme, int, int], str]
    stored: Callable[[str, int, int, Scheme, str], dict[str, Typed]]
    encode: Callable[[str, Integers], dict[str, Stored]]
    decode: Callable[[str, Read, Scheme], Integers]
    describe: Callable[[Mapping[str, Scheme], Sequence[str], Sequence[str]], Description]
    declared: Callable[[Path, Mapping[str, Any]], Declared]
    scale_dtype: str = ""
    """The dtype of scales where the format fixes it; "" where it is the writer's choice."""

    @property
    def scales(self) -> str:
        return self.marks[0]


def pack_nibbles(values: npt.NDArray[np.int8], order: Sequence[int] = NATURAL) -> npt.NDArray[np.int32]:
    """Return integers 0 to 15 [..., 8 n] as words [..., n]: nibble i, from the lowest, is the `order[i]`th."""
    eights = values.reshape(*values.shape[:-1], -1, NIBBLES)[..., list(order)].astype(np.uint8)
    halves = eights[..., 0::2] | eights[..., 1::2] << 4
    return np.ascontiguousarray(halves).view("<i4")[..., 0].astype(np.int32, copy=False)


def unpack_nibbles(words: npt.NDArray[np.int32], order: Sequence[int] = NATURAL) -> npt.NDArray[np.int8]:
    """Return the integers [..., 8 n] of words [..., n]."""
    halves = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(*words.shape, NIBBLES // 2)
    eights = np.empty((*words.shape, NIBBLES), np.int8)
    eights[..., list(order[0::2])] = halves & 0xF
    eights[..., list(order[1::2])] = halves >> 4
    return eights.reshape(*words.shape[:-1], -1)


def of_integers(values: npt.NDArray[Any], dtype: str) -> Stored:
    """Return an array of integers as a stored tensor."""
    return Stored(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def of_floats(values: Float32, dtype: str, shape: tuple[int, ...], name: str) -> Stored:
    """Return floats as a stored tensor; refuse a dtype that does not hold each of them exactly."""
    if not fits(values, dtype):
        raise LayoutError(
            f"{name}: a scale has no exact value in {dtype}, which is what this format stores",
            code="quantized.inexact",
            repair="quantize the original anew with this --format: its scales are then rounded before they are used",
        )
    return Stored(dtype, shape, from_float32(values, dtype).reshape(-1))


def fits(values: Float32, dtype: str) -> bool:
    """Say whether a dtype holds float32 values exactly."""
    return dtype == "F32" or bool(np.array_equal(rounded(values, dtype), values))


def floats_of(stored: Stored, shape: tuple[int, ...], name: str) -> Float32:
    """Return a stored tensor of floats in float32; refuse what is no number."""
    assert stored.dtype in FLOATS, "dtypes are checked when a directory is opened"
    values = to_float32(stored.data, stored.dtype).reshape(shape)
    if not np.isfinite(values).all():
        raise InputError(
            f"{name} has values that are not finite",
            code="quantized.scale",
            repair="the model is damaged: make it again",
        )
    return values


def refuse_layout(directory: Path, found: str, name: str) -> InputError:
    """Return the error for a layout of a known format that is not read."""
    return InputError(
        f"{directory} is a {name} model with {found}, which Ferry does not read",
        code="quantized.layout",
        repair="start from the float model it was made of",
    )
