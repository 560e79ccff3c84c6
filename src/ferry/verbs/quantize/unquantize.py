"""`ferry quantize --dequantize`: a quantized model as an ordinary float model, a linear layer at a time.

A weight becomes (integers - zeros) x scale in float32, rounded once to the dtype of the result. What stayed float is
carried bit for bit, unless another dtype is asked for. Smoothing needs no undoing: it changed no function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ferry.core.errors import InputError
from ferry.core.floats import FLOATS, Bytes, from_float32, to_float32
from ferry.core.plan import Plan
from ferry.core.progress import Reporter
from ferry.core.quantized import Integers
from ferry.core.quantized import dequantize as floats_of
from ferry.core.verb import Result
from ferry.formats.hf_stream import Tensor, shard_headers
from ferry.formats.opening import open_promised_quantized
from ferry.formats.quantized import WEIGHT, QuantizedCheckpoint, with_description
from ferry.formats.quantized_format import Description
from ferry.verbs.quantize.rewriting import (
    Pieces,
    Reader,
    Rewriting,
    Wish,
    altered_files,
    plan_of,
    small_files,
    write,
)

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DTYPE_KEYS = ("dtype", "torch_dtype")
DEFAULT_DTYPE = "bfloat16"
NESTED = "text_config"
ITEMS = 1 << 21
"""Weights that are made float at a time."""


def plan_dequantize(config: Wish) -> Plan:
    """Return what would be written; refuse what cannot be."""
    return plan_of(_prepare(config), config)


def dequantize(config: Wish, reporter: Reporter) -> Result:
    """Write the float model; return where it is."""
    return write(_prepare(config), config, reporter)


def _prepare(config: Wish) -> Rewriting:
    assert config.model is not None, "checked by the config"
    assert config.output is not None, "checked by the config"
    source = open_promised_quantized(config.model)
    word, why = _dtype(source, config.dtype)
    dtype = DTYPES[word]
    # Floats keep their dtype where none is named: a model may mix them.
    kept = "" if config.dtype == "auto" else dtype
    tensors = _tensors(source, dtype, kept)
    headers = shard_headers(tensors, config.max_shard_size)
    name = source.format.name
    change = (
        f"{len(source.schemes)} weights dequantized from {name}: (integers - zeros) x scale in float32, rounded once "
        f"to {dtype}"
    )
    return Rewriting(
        source=source,
        target=config.output,
        kind="hf-model",
        summary=f"{source.directory.resolve().name} ({name}) -> float, {dtype}",
        headers=headers,
        small=small_files(source, _with_dtype(source.model.config, word), headers),
        pieces=lambda reader: _pieces(reader, tensors),
        changes=(change, *altered_files(source)),
        choices=(f"dtype {word}: {why}",),
        details={"action": "dequantize", "from": name, "dtype": dtype},
    )


def _dtype(source: QuantizedCheckpoint, asked: str) -> tuple[str, str]:
    """Return the dtype of the result as config.json spells it, and why."""
    if asked != "auto":
        return asked, "as asked for"
    config = source.model.config
    for place in (config, config.get(NESTED) or {}):
        for key in DTYPE_KEYS:
            if place.get(key) in DTYPES:
                return place[key], "config.json says so"
    return DEFAULT_DTYPE, "config.json names none"


def _tensors(source: QuantizedCheckpoint, dtype: str, kept: str) -> list[Tensor]:
    """Return every tensor of the float model, in the order of the model; carried ones and copies last."""
    canonical = source.model.canonical()
    tensors: list[Tensor] = []
    for name, shape in canonical.items():
        is_quantized = name.removesuffix(WEIGHT) in source.schemes and name.endswith(WEIGHT)
        tensors.append((name, dtype if is_quantized else kept or source.found[name].dtype, shape))
    integers = {name for module in source.schemes for name in source.tensors_of(module)}
    for name, item in source.found.items():
        if name not in canonical and name not in integers:
            copied = kept if not source.model.is_carried(name) else ""
            tensors.append((name, copied or item.dtype, item.shape))
    return tensors


def _pieces(reader: Reader, tensors: list[Tensor]) -> Pieces:
    for name, dtype, _ in tensors:
        module = name.removesuffix(WEIGHT)
        if name.endswith(WEIGHT) and module in reader.source.schemes:
            integers = reader.integers(module)
            yield from ((name, data) for data in weight_windows(module, integers, dtype))
            continue
        found = reader.source.found[name].dtype
        for data in reader.windows(name):
            yield name, data if found == dtype else _recast(name, data, found, dtype)


def weight_windows(module: str, integers: Integers, dtype: str, items: int = ITEMS) -> Iterator[Bytes]:
    """Return the bytes of a weight, some rows at a time."""
    rows, cols = integers.shape
    step = max(1, items // cols)
    per_row = len(integers.scales) == rows
    for row in range(0, rows, step):
        part = slice(row, row + step)
        scales = slice(row, row + step) if per_row else slice(None)
        zeros = integers.zeros[scales] if integers.zeros is not None else None
        some = replace(integers, values=integers.values[part], scales=integers.scales[scales], zeros=zeros)
        yield _rounded(module, floats_of(some), dtype)


def _recast(name: str, data: Bytes, found: str, dtype: str) -> Bytes:
    assert found in FLOATS, "dtypes are checked when a directory is opened"
    return _rounded(name, to_float32(data, found), dtype)


def _rounded(name: str, values: Any, dtype: str) -> Bytes:
    data = from_float32(values, dtype)
    if not np.isfinite(to_float32(data, dtype)).all():
        raise InputError(
            f"{name} has values that are not finite in {dtype}", code="quantize.overflow", repair="use --dtype bfloat16"
        )
    return data


def _with_dtype(config: Any, word: str) -> dict[str, Any]:
    """Return config.json of the float model."""
    plain = with_description(config, Description(None, {}))
    named = [key for key in DTYPE_KEYS if key in plain] or [DTYPE_KEYS[1]]
    plain |= dict.fromkeys(named, word)
    inner = plain.get(NESTED)
    if isinstance(inner, dict):
        plain[NESTED] = inner | {key: word for key in DTYPE_KEYS if key in inner}
    return plain
