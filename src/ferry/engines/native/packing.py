"""Weights of a model directory, packed for the kernels: floats as they are stored, 8-bit integers, or floats rounded.

Nothing is converted that need not be: bfloat16 weights stay two bytes and are widened when they are used, which is
exact. One linear at a time is in memory twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ferry.core import family as f
from ferry.core.family import Model
from ferry.core.floats import FLOATS, to_float32
from ferry.core.gather import Items2D, Sources
from ferry.core.layout import Local, Part, Piece, whole
from ferry.core.quantized import PER_ROW, PER_TENSOR, Scheme
from ferry.engines.native.library import INT8, KINDS, Float32, Library, Packed
from ferry.formats.hf import open_hf
from ferry.formats.quantized import WEIGHT, format_of, open_quantized


class Weights:
    """The weights of one directory. Use as a context manager.

    `scheme` is that of its linears, None for floats. With `rounded` float linears become 8-bit integers with a scale a
    row, as `core.quantized.quantize` makes them.
    """

    def __init__(self, directory: Path, library: Library, rounded: bool) -> None:
        self._library = library
        self._checkpoint = open_quantized(directory) if format_of(directory) else None
        opened = self._checkpoint or open_hf(directory)
        self.model: Model = opened.model
        self._sources = Sources(opened.slots)
        self._rounded = rounded
        self.num_bytes = 0

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._sources.__exit__(*error)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Return the schemes of the linears that are integers, by module."""
        return dict(self._checkpoint.schemes) if self._checkpoint else {}

    def can_be_packed(self) -> bool:
        """Say whether the kernels compute what the weights mean: floats, or 8 bits with activations by token."""
        kinds = {(s.bits, s.group in (PER_ROW, PER_TENSOR), s.activations) for s in self.schemes.values()}
        floats = [name for name in self.model.canonical() if name.removesuffix(WEIGHT) not in self.schemes]
        if not kinds <= {(8, True, "token")} or any(self._sources.dtype(name) not in FLOATS for name in floats):
            return False
        return all(
            len({self._kind(self.model.part(role, layer)) for role in roles}) == 1
            for layer in range(self.model.dims.num_layers)
            for roles in ((f.QUERY, f.KEY, f.VALUE), (f.GATE, f.UP))
        )

    def floats(self, role: str, layer: int = 0) -> Float32 | None:
        """Return a vector in float32; None where the model has none of this role."""
        if not self.model.has(role):
            return None
        items, dtype = self._sources.gather(_local(self.model.part(role, layer)))
        self.num_bytes += items.size * 4
        values: Float32 = _float32(items, dtype).reshape(-1).copy()
        return values

    def linear(
        self, roles: Sequence[str], layer: int = 0, bias_roles: Sequence[str] = (), *, is_head: bool = False
    ) -> Packed:
        """Return the weights of roles, one below the other. Embedding and head are never rounded."""
        parts = [self.model.part(role, layer) for role in roles]
        kind = self._kind(parts[0])
        rounding = self._rounded and not is_head and kind != INT8
        packed = Packed.empty(INT8 if rounding else kind, sum(part.rows for part in parts), parts[0].cols)
        row = 0
        for part in parts:
            if kind == INT8:
                self._pack_integers(part, packed, row)
            else:
                items, dtype = self._sources.gather(_local(part))
                if rounding:
                    self._pack_rounded(_float32(items, dtype), packed, row)
                else:
                    self._library.pack(items, packed, row)
            row += part.rows
        biases = [self.floats(role, layer) for role in bias_roles]
        if any(bias is not None for bias in biases):
            packed.bias = np.concatenate([bias for bias in biases if bias is not None])
            assert len(packed.bias) == packed.rows, (roles, layer)
        self.num_bytes += packed.num_bytes
        return packed

    def _kind(self, part: Part) -> int:
        if self._checkpoint and part.name.removesuffix(WEIGHT) in self._checkpoint.schemes:
            return INT8
        return KINDS[self._sources.dtype(part.name)]

    def _pack_integers(self, part: Part, into: Packed, row: int) -> None:
        assert self._checkpoint is not None
        assert into.scales is not None
        integers = self._checkpoint.integers(part.name.removesuffix(WEIGHT))
        band = slice(part.row, part.row + part.rows)
        self._library.pack(integers.values[band], into, row)
        scales: npt.NDArray[np.float32] = np.broadcast_to(integers.scales, (integers.values.shape[0], 1))
        into.scales[row : row + part.rows] = scales[band, 0]

    def _pack_rounded(self, values_NK: Float32, into: Packed, row: int) -> None:
        assert into.scales is not None
        integers, scales = self._library.round(values_NK)
        self._library.pack(integers, into, row)
        into.scales[row : row + len(scales)] = scales


def _local(part: Part) -> Local:
    """Return a band of rows of a canonical tensor, stored by itself."""
    if part.row:
        return Local(part.rows, part.cols, part.ndim, (Piece(part.name, part.row, 0, part.rows, part.cols, 0),))
    return whole(part)


def _float32(items: Items2D, dtype: str) -> Float32:
    return to_float32(np.ascontiguousarray(items).view(np.uint8), dtype)
