"""Opens a directory of quantized weights, whichever format they are in: headers only, and every tensor accounted for.

A linear is quantized where its tensors say so; what the directory says about itself must agree. Everything else is the
float model it was made of: the canonical tensors of its family, carried ones, and copies of a tied embedding.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.carry import Spec
from ferry.core.dtypes import num_bytes
from ferry.core.errors import InputError, IntegrityError
from ferry.core.family import (
    ATTENTION_OUT,
    DENSE_ROLES,
    EXPERT_ROLES,
    EXPERT_UP,
    HEAD,
    KEY,
    QUERY,
    ROUTER,
    VALUE,
    Model,
)
from ferry.core.floats import FLOATS, Bytes
from ferry.core.layout import Slot, declared, whole
from ferry.core.quantized import Integers, Scheme
from ferry.core.safetensors import read_header
from ferry.families.registry import model_of, read_config
from ferry.formats import ascend, awq, compressed_tensors
from ferry.formats.checkpoint import Assets, payload_ranges
from ferry.formats.hf import Found, as_part, find_assets
from ferry.formats.quantized_format import Declared, Description, Format, Stored, Typed

FORMATS = {found.name: found for found in (compressed_tensors.FORMAT, awq.FORMAT, ascend.FORMAT)}
LINEAR_ROLES = (QUERY, KEY, VALUE, ATTENTION_OUT, *DENSE_ROLES, *EXPERT_ROLES)
"""The roles whose weights are quantized. Embedding, router and head stay float."""
WEIGHT = ".weight"
WINDOW_BYTES = 8 << 20
SHOWN = 5


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A directory of quantized weights, opened: headers only."""

    directory: Path
    format: Format
    model: Model
    schemes: Mapping[str, Scheme]
    """The quantized linears by module, in the order of the model."""
    slots: tuple[Slot, ...]
    """One for each stored tensor, which is a canonical tensor of its own here."""
    assets: Assets
    found: Mapping[str, Found]

    def specs(self) -> dict[str, Spec]:
        """Return every stored tensor as the carrier sees it."""
        return {slot.label: Spec(slot.dtype, slot.local.rows, slot.local.cols) for slot in self.slots}

    def payload_ranges(self) -> dict[Path, tuple[tuple[int, int], ...]]:
        return payload_ranges(self.slots)

    def tensors_of(self, module: str) -> dict[str, Typed]:
        """Return the stored tensors of a quantized linear, in the order they are written."""
        rows, cols = self.shape(module)
        names = self.format.stored(module, rows, cols, self.schemes[module], "F32")
        return {name: (self.found[name].dtype, self.found[name].shape) for name in names}

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape [N, K] of the weight of a linear."""
        rows, cols = self.model.canonical()[module + WEIGHT]
        return rows, cols

    def read(self, name: str) -> Stored:
        """Return one stored tensor with its bytes."""
        item = self.found[name]
        data = np.fromfile(item.path, np.uint8, num_bytes(item.dtype, item.shape), offset=item.offset)
        if data.nbytes != num_bytes(item.dtype, item.shape):
            raise IntegrityError(f"{item.path} ends inside {name}", code="carry.cut", repair="fetch it again")
        return Stored(item.dtype, item.shape, data)

    def windows(self, name: str, window_bytes: int = WINDOW_BYTES) -> Iterator[Bytes]:
        """Return the bytes of one stored tensor, some at a time."""
        item = self.found[name]
        position, end = item.offset, item.offset + num_bytes(item.dtype, item.shape)
        while position < end:
            data = np.fromfile(item.path, np.uint8, min(window_bytes, end - position), offset=position)
            if not data.nbytes:
                raise IntegrityError(f"{item.path} ends inside {name}", code="carry.cut", repair="fetch it again")
            yield data
            position += data.nbytes

    def integers(self, module: str) -> Integers:
        """Read one quantized linear."""
        return self.format.decode(module, self.read, self.schemes[module])


def format_of(directory: Path) -> str:
    """Return what a directory says its weights are quantized with, as it says it; "" where it says nothing."""
    if (directory / ascend.FILE).is_file():
        return ascend.NAME
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return ""  # whoever opens the directory says what is wrong with it
    return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else ""


def known_format(directory: Path) -> Format:
    """Return the format of a directory; refuse one that Ferry does not read, by its name."""
    name = format_of(directory)
    if name not in FORMATS:
        raise InputError(
            f"{directory} is quantized with {name or 'nothing'}, expected {', '.join(FORMATS)}",
            code="quantized.unknown",
            repair="start from the float model it was made of",
        )
    return FORMATS[name]


def open_quantized(directory: Path) -> QuantizedCheckpoint:
    """Open a directory; raise InputError naming every tensor that is missing, extra, or of another shape or dtype."""
    form = known_format(directory)
    config = read_config(directory / "config.json")
    model = model_of(config, str(directory / "config.json"))
    said = form.declared(directory, config)
    found = _find(directory)
    expected: dict[str, Typed] = {}
    schemes: dict[str, Scheme] = {}
    lost: list[str] = []
    for name, shape in model.canonical().items():
        module = name.removesuffix(WEIGHT)
        if len(shape) == 2 and name != module and _is_quantized(form, module, found):
            schemes[module] = said.scheme
            refusal = form.refuses(said.scheme, *shape)
            lost += [f"{name} ({refusal})"] if refusal else []
            expected |= {} if refusal else form.stored(module, *shape, said.scheme, "F32")
        else:
            expected[name] = ("F32", shape)
    head = model.roles.get(HEAD)
    if model.dims.tied and isinstance(head, str) and head in found:
        expected[head] = ("F32", (model.dims.vocab_size, model.dims.hidden_size))
    _refuse_strangers(directory, form, model, expected, found, lost)
    _refuse_contradictions(directory, model, schemes, said)
    slots = tuple(_slot(name, item) for name, item in found.items())
    return QuantizedCheckpoint(directory, form, model, schemes, slots, find_assets(directory), found)


def float_modules(model: Model, schemes: Mapping[str, Scheme]) -> tuple[str, ...]:
    """Return the linear layers that stay float: head and routers (also where they have no tensor), and fallbacks."""
    head = model.roles.get(HEAD)
    names = [head] if isinstance(head, str) else []
    names += [name for name, shape in model.canonical().items() if len(shape) == 2 and _is_linear(model, name)]
    return tuple(dict.fromkeys(name.removesuffix(WEIGHT) for name in names if name.removesuffix(WEIGHT) not in schemes))


def description(form: Format, model: Model, schemes: Mapping[str, Scheme], tensors: Sequence[str]) -> Description:
    """Return what goes beside the weights of a quantized model. `tensors` are the names of all that are stored."""
    kept = list(float_modules(model, schemes))
    if form.name == awq.NAME:
        kept += _float_expert_sets(model, schemes)
    if model.family.vision is not None and form.name == compressed_tensors.NAME:
        kept.append(f"{compressed_tensors.PATTERN}.*{re.escape(model.family.vision.tensors)}.*")
    elif model.family.vision is not None and form.name == awq.NAME:
        kept.append(model.family.vision.tensors.removesuffix("."))
    return form.describe(schemes, kept, tensors)


def _float_expert_sets(model: Model, schemes: Mapping[str, Scheme]) -> list[str]:
    """Return what holds the experts of a layer, where they stay float: engines look for parts of that name."""
    layers = [layer for layer in range(model.dims.num_layers) if model.dims.is_moe(layer)]
    ups = [model.part(EXPERT_UP, layer, 0).name.removesuffix(WEIGHT) for layer in layers]
    # `experts.0.up_proj`, and experts of a layer go together.
    return [up.rsplit(".", 2)[0] for up in ups if up not in schemes]


def with_description(config: Mapping[str, Any], described: Description) -> dict[str, Any]:
    """Return a config.json that says how its weights are quantized, and nothing of another format."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return plain if described.config is None else {**plain, "quantization_config": described.config}


class IntegersDigest:
    """One sha256 over the integers, scales and zeros of all linears, whatever format they are stored in."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def add(self, module: str, integers: Integers) -> None:
        rows, groups = integers.scales.shape
        static = "" if integers.input_scale is None else integers.input_scale.hex()
        self._total.update(f"{module}\t{list(integers.shape)}\t{rows} {groups}\t{static}\n".encode())
        for part in (integers.values, integers.scales, integers.zeros):
            if part is not None:
                self._total.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        return self._total.hexdigest()


def integers_sha256(checkpoint: QuantizedCheckpoint) -> str:
    """Return the digest of all integers of a directory, reading it whole."""
    total = IntegersDigest()
    for module in checkpoint.schemes:
        total.add(module, checkpoint.integers(module))
    return total.hexdigest()


def _is_linear(model: Model, name: str) -> bool:
    return model.role_of(name) in (*LINEAR_ROLES, ROUTER)


def _is_quantized(form: Format, module: str, found: Mapping[str, Found]) -> bool:
    weight = found.get(module + WEIGHT)
    return (weight is not None and weight.dtype == "I8") or any(f"{module}.{mark}" in found for mark in form.marks)


def _find(directory: Path) -> dict[str, Found]:
    """Return every tensor of the weight files, in their order."""
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    paths = _named_by(indexes[0]) if indexes else sorted(directory.glob("*.safetensors"))
    if not paths or (len(paths) > 1 and not indexes):
        what = f"{len(paths)} safetensors files and no index of them" if paths else "no *.safetensors"
        raise InputError(f"{directory} has {what}", code="hf.no-index" if paths else "hf.no-weights")
    found: dict[str, Found] = {}
    for path in paths:
        for name, entry in read_header(path).tensors.items():
            if name in found:
                raise InputError(f"tensor {name} is in {found[name].path} and in {path}", code="hf.twice")
            found[name] = Found(path, entry.dtype, entry.shape, entry.start)
    return found


def _named_by(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} cannot be read: {error}", code="hf.index") from None
    absent = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if absent:
        raise InputError(
            f"{index} names {', '.join(absent)}, which are not there",
            code="hf.missing-file",
            repair="the download is incomplete: fetch it again",
        )
    return [index.parent / name for name in names]


def _slot(name: str, item: Found) -> Slot:
    if len(item.shape) <= 2:
        return Slot(item.path, item.offset, item.dtype, whole(as_part(name, item.shape)), name)
    flat = whole(as_part(name, (item.shape[0], prod(item.shape[1:]))))
    return Slot(item.path, item.offset, item.dtype, declared(flat, item.shape), name)


def _refuse_strangers(
    directory: Path,
    form: Format,
    model: Model,
    expected: Mapping[str, Typed],
    found: Mapping[str, Found],
    impossible: list[str],
) -> None:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected and not model.is_carried(name)]
    others = [
        f"{name} {found[name].dtype} {list(found[name].shape)}, expected {dtype} {list(shape)}"
        for name, (dtype, shape) in expected.items()
        if name in found and not _agrees(found[name], dtype, shape)
    ]
    complaints = [
        f"{len(names)} {word}: {'; '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"
        for word, names in (
            ("missing", missing), ("unknown", unknown), ("of another shape or dtype", others),
            ("impossible", impossible),
        )
        if names
    ]  # fmt: skip
    if complaints:
        raise InputError(
            f"{directory} is not a complete {model.family.name} model in {form.name}; tensors {'; '.join(complaints)}",
            code="quantized.tensors",
            repair="nothing was written; fetch or make it again",
        )


def _agrees(item: Found, dtype: str, shape: tuple[int, ...]) -> bool:
    """Floats may be of any size: the engine that made them decided."""
    return item.shape == shape and (item.dtype in FLOATS if dtype in FLOATS else item.dtype == dtype)


def _refuse_contradictions(directory: Path, model: Model, schemes: Mapping[str, Scheme], said: Declared) -> None:
    """An engine believes the configuration: linears that it calls quantized must be."""
    names = [name for name in model.canonical() if name.removesuffix(WEIGHT) not in schemes]
    wrong = [
        name.removesuffix(WEIGHT)
        for name in names
        if model.role_of(name) in LINEAR_ROLES and said.covers(name.removesuffix(WEIGHT))
    ]
    if wrong:
        raise InputError(
            f"{directory} says that {len(wrong)} linears are quantized which are float: {', '.join(wrong[:SHOWN])}"
            f"{' ...' if len(wrong) > SHOWN else ''}",
            code="quantized.contradiction",
            repair="name them among those that are not converted, or make the model again",
        )
