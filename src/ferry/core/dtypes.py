"""The data types of tensors at rest, by their safetensors names: size in bytes and nothing else."""

from __future__ import annotations

ITEM_BYTES: dict[str, int] = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def num_items(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[dtype] * num_items(shape)
