"""Pickles, without running any of their code.

Reading: an unpickler that imports nothing. Names on a short allow-list become plain data; every other class becomes an
`Opaque` that remembers its name and arguments and does nothing. Writing: the few opcodes of protocol 2 that a
checkpoint needs, so that a file torch can load is made without torch.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

from ferry.core.dtypes import ITEM_BYTES, num_bytes
from ferry.core.errors import InputError

STORAGE_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
"""The classes of typed storages. Younger dtypes have none: their tensors name an untyped storage and a dtype."""
DTYPE_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "uint64": "U64", "uint32": "U32", "uint16": "U16",
}  # fmt: skip
DTYPE_TORCH = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Global(NamedTuple):
    """A name that a pickle refers to, such as `torch.bfloat16`."""

    module: str
    name: str


class StorageRef(NamedTuple):
    """A run of items in the container that holds the pickle. `dtype` is a safetensors name."""

    dtype: str
    key: str
    numel: int


class TensorRef(NamedTuple):
    """A tensor as a pickle describes it. `offset` and `stride` count items of the storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Opaque:
    """An object of a class that is not on the allow-list: its name, arguments and state, and no behaviour."""

    kind = Global("", "")

    args: tuple[Any, ...]
    fields: dict[str, Any]
    state: Any
    items: list[Any]

    # In __new__, because pickles of protocol 2 and later make objects without calling __init__.
    def __new__(cls, *args: Any, **fields: Any) -> Opaque:
        made = super().__new__(cls)
        made.args, made.fields, made.state, made.items = args, fields, None, []
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{self.kind.module}.{self.kind.name}>"

    # Opaque objects stand as dictionary keys in some checkpoints (enums, index objects).
    def __hash__(self) -> int:
        return hash(self.kind)

    def __eq__(self, other: object) -> bool:
        return self is other


class Fields(dict[str, Any]):
    """An object whose attributes matter (`argparse.Namespace`, checkpoint metadata), read as its attributes."""

    kind = Global("", "")

    args: tuple[Any, ...]

    def __new__(cls, *args: Any, **fields: Any) -> Fields:
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *_: Any, **fields: Any) -> None:
        super().__init__(fields)

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            self.update(part or {})

    def __hash__(self) -> int:  # type: ignore[override]
        return hash((self.kind, repr(sorted(self.items(), key=repr)), repr(self.args)))


def _rebuild_tensor(
    storage: StorageRef, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> TensorRef:
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _rebuild_tensor_with_dtype(
    storage: StorageRef,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    _: bool,
    _hooks: Any,
    dtype: Global,
) -> TensorRef:
    name = TORCH_DTYPES[dtype.name]
    typed = StorageRef(name, storage.key, storage.numel // ITEM_BYTES[name])
    return TensorRef(typed, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: TensorRef, *_: Any) -> TensorRef:
    return data


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_with_dtype,
    ("torch.storage", "UntypedStorage"): StorageRef("U8", "", 0),
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("__builtin__", "dict"): dict, ("builtins", "dict"): dict,
    ("__builtin__", "list"): list, ("builtins", "list"): list,
    ("__builtin__", "set"): set, ("builtins", "set"): set,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Resolves names by table only. `fields` names further classes that are read as their attributes."""

    def __init__(self, data: bytes, fields: frozenset[str]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._fields = fields | {"argparse.Namespace"}
        self._made: dict[Global, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return StorageRef(STORAGE_DTYPES[name], "", 0)
        if module == "torch" and name in TORCH_DTYPES:
            return Global(module, name)
        kind = Global(module, name)
        if kind not in self._made:
            base: type = Fields if f"{module}.{name}" in self._fields else Opaque
            self._made[kind] = type(name, (base,), {"kind": kind})
        return self._made[kind]

    def persistent_load(self, pid: Any) -> StorageRef:
        tag, storage, key, _location, numel = pid
        if tag != "storage" or not isinstance(storage, StorageRef):
            raise pickle.UnpicklingError(f"storage of an unknown kind: {pid!r}")
        return StorageRef(storage.dtype, str(key), int(numel))


def read_pickle(data: bytes, where: str, fields: frozenset[str] = frozenset()) -> Any:
    """Return the content of a pickle as plain data, `TensorRef`, `Fields` and `Opaque`; nothing foreign is run."""
    try:
        return _Unpickler(data, fields).load()
    # Foreign bytes can fail in any way; each is the same mistake to the user.
    except Exception as error:  # noqa: BLE001
        raise InputError(
            f"{where} has a pickle that cannot be read: {type(error).__name__}: {error}",
            code="pickle.unreadable",
            repair="is it a PyTorch checkpoint, and complete?",
        ) from None


class Tensor(NamedTuple):
    """A tensor to be described in a pickle; its bytes are the storage named `key` of the container."""

    dtype: str
    shape: tuple[int, ...]
    key: str


class Instance(NamedTuple):
    """An object to be rebuilt by `cls.__new__(cls, *args)` and its state (None: no state)."""

    cls: Global
    state: dict[str, Any] | None = None
    args: tuple[Any, ...] = ()


class Call(NamedTuple):
    """An object to be rebuilt by calling a function."""

    function: Global
    args: tuple[Any, ...]


def write_pickle(value: Any) -> bytes:
    """Return `value` as a protocol 2 pickle. Values: plain data, `Tensor`, `Instance`, `Call`, `Global`."""
    out = bytearray(b"\x80\x02")
    _emit(value, out)
    return bytes(out + b".")


def _emit(value: Any, out: bytearray) -> None:
    if value is None:
        out += b"N"
    elif isinstance(value, bool):
        out += b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        _emit_int(value, out)
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, Global):
        out += f"c{value.module}\n{value.name}\n".encode()
    elif isinstance(value, Tensor):
        _emit_tensor(value, out)
    elif isinstance(value, Instance):
        _emit(value.cls, out)
        _emit(value.args, out)
        out += b"\x81"
        if value.state is not None:
            _emit(value.state, out)
            out += b"b"
    elif isinstance(value, Call):
        _emit(value.function, out)
        _emit(value.args, out)
        out += b"R"
    else:
        _emit_collection(value, out)


def _emit_int(value: int, out: bytearray) -> None:
    if -(2**31) <= value < 2**31:
        out += b"J" + struct.pack("<i", value)
    else:
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out += b"\x8a" + bytes([len(digits)]) + digits


def _emit_collection(value: Any, out: bytearray) -> None:
    if isinstance(value, dict):
        out += b"}("
        for key, item in value.items():
            _emit(key, out)
            _emit(item, out)
        out += b"u"
    elif isinstance(value, list):
        out += b"]("
        for item in value:
            _emit(item, out)
        out += b"e"
    elif type(value) is tuple:
        out += b"("
        for item in value:
            _emit(item, out)
        out += b"t"
    else:
        raise AssertionError(f"no way to pickle {type(value)}")


def _emit_tensor(tensor: Tensor, out: bytearray) -> None:
    stride, step = [], 1
    for size in reversed(tensor.shape):
        stride.append(step)
        step *= size
    typed = tensor.dtype in DTYPE_STORAGES
    dtype = () if typed else (Global("torch", DTYPE_TORCH[tensor.dtype]),)
    storage = Global("torch", DTYPE_STORAGES[tensor.dtype]) if typed else Global("torch.storage", "UntypedStorage")
    numel = step if typed else num_bytes(tensor.dtype, tensor.shape)
    _emit(Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"), out)
    out += b"("
    _emit(("storage", storage, tensor.key, "cpu", numel), out)
    out += b"Q"
    hooks = Call(Global("collections", "OrderedDict"), ())
    for part in (0, tensor.shape, tuple(reversed(stride)), False, hooks, *dtype):
        _emit(part, out)
    out += b"tR"
