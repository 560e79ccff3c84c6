"""The C++ library of kernels, as Python sees it. The structs here and in `kernels/model.h` have the same fields.

The library is built when Ferry is installed where a compiler is; without it `load()` returns None and transformers
computes. What it is given is held by whoever calls: pointers stay good while the arrays behind them live.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ferry.recipes.engines import cpu_features

Float32 = npt.NDArray[np.float32]
FLOAT32, BFLOAT16, FLOAT16, INT8 = range(4)
"""Kinds of packed weights, as in `kernels/linear.h`."""
KINDS = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT16, "I8": INT8}
ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, INT8: 1}
PANEL = 16
"""Rows of a weight that lie side by side, and tokens of the cache: blocks are multiples of it."""
MAX_HEAD_DIM = 256
MAX_INTEGER_COLS = (2**31 - 1) // (127 * 128)
"""Products of two 8-bit integers whose sum is sure to stay within 32 bits."""
LAYOUT = 1
"""Changes with every change of a struct, here and in `kernels/functions.h`."""

NEEDED = {"avx2": frozenset({"avx2", "fma", "f16c"}), "plain": frozenset[str]()}
"""Instruction sets, the best first, and what a processor must have for what is compiled with them: see `setup.py`."""


class LinearStruct(Structure):
    _fields_: ClassVar[list[Any]] = [
        *[(name, c_int64) for name in ("kind", "rows", "cols")],
        *[(name, c_void_p) for name in ("data", "scales", "bias")],
    ]


class LayerStruct(Structure):
    _fields_: ClassVar[list[Any]] = [
        *[(name, LinearStruct) for name in ("qkv", "attention_out", "gate_up", "down")],
        *[(name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm", "keys", "values")],
        ("window", c_int64),
    ]


SIZES = ("num_layers", "hidden", "ffn", "num_heads", "num_groups", "head_dim", "rotary_dim", "block_size")


class ModelStruct(Structure):
    _fields_: ClassVar[list[Any]] = [
        *[(name, c_int64) for name in SIZES],
        *[(name, c_float) for name in ("epsilon", "scale")],
        *[(name, c_void_p) for name in ("cosines", "sines", "final_norm")],
        *[(name, LinearStruct) for name in ("embedding", "head")],
        ("layers", POINTER(LayerStruct)),
    ]


class BatchStruct(Structure):
    _fields_: ClassVar[list[Any]] = [
        *[(name, c_int64) for name in ("num_tokens", "num_sequences", "num_logits", "table_width")],
        *[(name, c_void_p) for name in ("tokens", "positions", "slots", "starts", "tables", "logits_rows", "logits")],
    ]


@dataclass(frozen=True)
class Library:
    """A loaded library. `name` is its instruction set."""

    name: str
    functions: ctypes.CDLL

    def workspace(self, num_threads: int) -> int:
        """Return a handle of threads and memory for one caller at a time; close it with `close`."""
        handle = self.functions.ferry_open(num_threads)
        if not handle:
            raise MemoryError(f"the system gives no memory, or no threads, for {num_threads} threads of the kernels")
        return int(handle)

    def close(self, workspace: int) -> None:
        self.functions.ferry_close(workspace)

    def forward(self, workspace: int, model: ModelStruct, batch: BatchStruct) -> None:
        """Run a step; the logits are written where the batch says."""
        if self.functions.ferry_forward(workspace, ctypes.byref(model), ctypes.byref(batch)):
            raise MemoryError

    def linear(self, workspace: int, weight: Packed, x_MK: Float32) -> Float32:
        """Return x @ weight.T [M, N] in float32, with activations rounded to 8 bits where the weight is."""
        x_MK = np.ascontiguousarray(x_MK, np.float32)
        out_MN = np.empty((len(x_MK), weight.rows), np.float32)
        given = (ctypes.byref(weight.struct()), c_void_p(x_MK.ctypes.data), len(x_MK), c_void_p(out_MN.ctypes.data))
        if self.functions.ferry_linear(workspace, *given):
            raise MemoryError
        return out_MN

    def pack(self, items_NK: npt.NDArray[Any], into: Packed, first: int) -> None:
        """Write rows of a weight into its packed form, beginning at row `first`."""
        items_NK = np.ascontiguousarray(items_NK)
        assert items_NK.itemsize == ITEM_BYTES[into.kind], (items_NK.dtype, into.kind)
        rows, cols = items_NK.shape
        assert cols == into.cols, (items_NK.shape, into.cols)
        assert first + rows <= into.rows, (first, rows, into.rows)
        source, target = c_void_p(items_NK.ctypes.data), c_void_p(into.data.ctypes.data)
        self.functions.ferry_pack(source, target, rows, cols, items_NK.itemsize, first)

    def round(self, weight_NK: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
        """Return a weight as 8-bit integers [N, K] and a scale a row [N]: round to nearest, as `core.quantized`."""
        weight_NK = np.ascontiguousarray(weight_NK, np.float32)
        values, scales = np.empty(weight_NK.shape, np.int8), np.empty(len(weight_NK), np.float32)
        pointers = [c_void_p(array.ctypes.data) for array in (weight_NK, values, scales)]
        if self.functions.ferry_round(pointers[0], *weight_NK.shape, pointers[1], pointers[2]):
            raise MemoryError
        return values, scales


@dataclass
class Packed:
    """A weight [N, K] in packed form, with what belongs to it."""

    kind: int
    rows: int
    cols: int
    data: npt.NDArray[np.uint8]
    scales: Float32 | None = None
    bias: Float32 | None = None

    @classmethod
    def empty(cls, kind: int, rows: int, cols: int) -> Packed:
        """Return room for a weight, all zero."""
        assert kind != INT8 or cols <= MAX_INTEGER_COLS, (cols, MAX_INTEGER_COLS)
        padded_cols = cols + cols % 2 if kind == INT8 else cols
        num_bytes = -(-rows // PANEL) * PANEL * padded_cols * ITEM_BYTES[kind]
        scales = np.zeros(rows, np.float32) if kind == INT8 else None
        return cls(kind, rows, cols, np.zeros(num_bytes, np.uint8), scales)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (self.data, self.scales, self.bias) if array is not None)

    def struct(self) -> LinearStruct:
        """Return it as the library takes it; good while this object lives."""
        return LinearStruct(self.kind, self.rows, self.cols, *map(address, (self.data, self.scales, self.bias)))


def address(array: npt.NDArray[Any] | None) -> int | None:
    """Return where an array lies, None for none."""
    return None if array is None else array.ctypes.data


@cache
def load() -> Library | None:
    """Return the best library that was built and runs on this processor, or None."""
    names = [name for name, needed in NEEDED.items() if needed <= cpu_features()]
    return next((found for found in map(open_library, names) if found is not None), None)


def open_library(name: str) -> Library | None:
    """Return the library of an instruction set, or None where it was not built. Whether it runs here is not asked."""
    spec = find_spec(f"ferry.engines.native._kernels_{name}")
    if spec is None or spec.origin is None:
        return None
    functions = ctypes.CDLL(spec.origin)
    functions.ferry_layout.restype = c_int64
    if functions.ferry_layout() != LAYOUT:
        return None
    functions.ferry_open.restype, functions.ferry_open.argtypes = c_void_p, [c_int64]
    functions.ferry_close.argtypes = [c_void_p]
    for function in (functions.ferry_forward, functions.ferry_linear, functions.ferry_round):
        function.restype = c_int64
    functions.ferry_forward.argtypes = [c_void_p, POINTER(ModelStruct), POINTER(BatchStruct)]
    functions.ferry_linear.argtypes = [c_void_p, POINTER(LinearStruct), c_void_p, c_int64, c_void_p]
    functions.ferry_pack.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64]
    functions.ferry_round.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_void_p]
    return Library(name, functions)
