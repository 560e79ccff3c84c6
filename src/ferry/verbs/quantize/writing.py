"""Pass 2 over the whole model: every tensor of the result, written unit by unit and journalled.

A unit is what comes before the blocks, a block, or what comes behind them. Blocks are made by `apply` (with text, in
torch) or here (without, in numpy, one weight at a time); everything else is carried as it is, a window at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ferry.core.errors import InputError, IntegrityError
from ferry.core.floats import FLOATS, Bytes, to_float32
from ferry.core.gather import Sources
from ferry.core.layout import Local, Part, whole
from ferry.core.layout import Piece as Rectangle
from ferry.core.manifest import Manifest
from ferry.core.progress import Reporter
from ferry.core.quantized import Scheme, dequantize, quantize
from ferry.core.smoothing import LinearWeight, groups, layer_tensors, linears
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.hf import as_part
from ferry.formats.quantized_format import Format, Typed
from ferry.verbs.quantize.journal import Journal
from ferry.verbs.quantize.shards import Entry, Piece, Shards, Unit

WINDOW_BYTES = 4 << 20
WEIGHT = ".weight"


@dataclass
class Written:
    """What pass 2 wrote: its tensors, the lines of the proof, and the digests of the source."""

    entries: list[Entry] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """The tensors of a source by unit: before the blocks, in each block, and behind them."""

    before: dict[str, Part]
    layers: tuple[dict[str, Part], ...]
    behind: dict[str, Part]


def contents(source: Checkpoint) -> Contents:
    """Return which tensors go into which unit. A second copy of a tied embedding is not among them."""
    model = source.model
    layers = tuple(layer_tensors(model, layer) for layer in range(model.dims.num_layers))
    inside = {name for layer in layers for name in layer}
    rest = {name: as_part(name, shape) for name, shape in model.canonical().items() if name not in inside}
    first = next(iter(rest))
    return Contents({first: rest.pop(first)}, layers, rest)


def units(source: Checkpoint, scheme: Scheme, format: Format, scale_dtype: str) -> list[Unit]:
    """Return every unit with the tensors it may become: each linear quantized, or float."""
    specs, found = source.specs(), contents(source)

    def floats(parts: Mapping[str, Part]) -> dict[str, Typed]:
        return {name: (specs[name].dtype, whole(part).shape) for name, part in parts.items()}

    before = floats(found.before)
    made = [Unit("before the blocks", (before,), before)]
    for number, parts in enumerate(found.layers):
        stored: dict[str, Typed] = {}
        for linear in linears(source.model, number):
            stored |= format.stored(linear.module, linear.rows, linear.cols, scheme, scale_dtype)
        weights = {linear.name for linear in linears(source.model, number)}
        kept = {name: typed for name, typed in floats(parts).items() if name not in weights}
        made.append(Unit(f"block {number}", (floats(parts), stored), kept | stored))
    carried = {name: (dtype, shape) for name, (dtype, shape, _) in source.carried.items()}
    behind = floats(found.behind) | carried
    made.append(Unit("behind the blocks", (behind,), behind))
    return made


def write_plain(
    number: int, parts: Mapping[str, Part], sources: Sources, shards: Shards, source: Checkpoint,
    promised: Manifest | None,
) -> dict[str, Any]:  # fmt: skip
    """Write a unit as it is, and return its line."""
    pieces = [
        Piece(name, sources.dtype(name), whole(part).shape, _windows(sources, part)) for name, part in parts.items()
    ]
    if number:
        pieces += [
            Piece(name, dtype, shape, [np.frombuffer(data, np.uint8)])
            for name, (dtype, shape, data) in source.carried.items()
        ]
    entries = shards.write(number, pieces)
    digests = {entry.name: entry.sha256 for entry in entries}
    check_source(digests, promised, source)
    return {"entries": [list(entry) for entry in entries], "sources": digests}


def outside_sha256(source: Checkpoint, sources: Sources) -> str:
    """Return one digest over everything that is not in a block: embedding, final norm, head."""
    found, total = contents(source), hashlib.sha256()
    for name, part in (found.before | found.behind).items():
        total.update(f"{name}\t".encode())
        for data in _windows(sources, part):
            total.update(data.data)
    return total.hexdigest()


def check_source(digests: Mapping[str, str], promised: Manifest | None, source: Checkpoint) -> None:
    """Refuse a source whose tensors are not those of its manifest."""
    if promised is None:
        return
    for name, sha256 in digests.items():
        known = promised.tensors.get(name)
        if known is not None and known.sha256 and known.sha256 != sha256:
            raise IntegrityError(
                f"{source.directory}: {name} differs from its manifest",
                code="quantize.source-damaged",
                repair="the source was changed or damaged after it was made: make or fetch it again",
            )


def _windows(sources: Sources, part: Part) -> Iterator[Bytes]:
    """Return the bytes of a tensor, some rows at a time."""
    row_items = max(1, part.cols)
    step = max(1, WINDOW_BYTES // (8 * row_items))
    for row in range(0, part.rows, step):
        rows = min(step, part.rows - row)
        rectangle = Rectangle(part.name, part.row + row, 0, rows, part.cols, 0)
        items, _ = sources.gather(Local(rows, part.cols, part.ndim, (rectangle,)))
        yield np.ascontiguousarray(items).reshape(-1).view(np.uint8)


def round_layer(
    number: int, parts: Mapping[str, Part], sources: Sources, shards: Shards, source: Checkpoint, scheme: Scheme,
    format: Format, scale_dtype: str, promised: Manifest | None,
) -> dict[str, Any]:  # fmt: skip
    """Round a block to nearest without text, one weight at a time; return its line. torch is not needed."""
    layer = number - 1
    kinds = {part.name: group.kind for group in groups(source.model, layer) for part in group.into}
    found = {linear.name: linear for linear in linears(source.model, layer)}
    entries: list[Entry] = []
    digests: dict[str, str] = {}
    lines = []
    for name, part in parts.items():
        items, dtype = sources.gather(whole(part))
        data = np.ascontiguousarray(items)
        digests[name] = hashlib.sha256(data.data).hexdigest()
        if name not in found:
            entries += shards.write(number, [Piece(name, dtype, whole(part).shape, [data.reshape(-1).view(np.uint8)])])
            continue
        check_float(name, dtype)
        pieces, error = _rounded(found[name], to_float32(data.view(np.uint8), dtype), scheme, format, scale_dtype)
        entries += shards.write(number, pieces)
        lines.append(
            {
                "name": found[name].module, "scheme": scheme.name, "group": kinds.get(name, ""), "strength": None,
                "nmse": None, "cosine": None, "weight_nmse": error, "reason": "",
            }
        )  # fmt: skip
    check_source(digests, promised, source)
    line = {"layer": layer, "nmse": None, "cosine": None, "self_check_nmse": None, "linears": lines}
    return {"entries": [list(entry) for entry in entries], "sources": digests, "layer": line}


def _rounded(
    linear: LinearWeight, weight_NK: Any, scheme: Scheme, format: Format, scale_dtype: str
) -> tuple[list[Piece], float]:
    norm = float(np.vdot(weight_NK, weight_NK))
    if not np.isfinite(norm):
        raise InputError(
            f"{linear.name} has values that are not finite",
            code="quantize.not-finite",
            repair="the model is damaged: `ferry verify` tells more",
        )
    integers = quantize(weight_NK, scheme, scale_dtype)
    pieces = [
        Piece(name, stored.dtype, stored.shape, [stored.data])
        for name, stored in format.encode(linear.module, integers).items()
    ]
    difference = dequantize(integers)
    difference -= weight_NK
    return pieces, float(np.vdot(difference, difference)) / norm if norm else 0.0


def check_float(name: str, dtype: str) -> None:
    """Refuse weights that are no floating-point numbers."""
    if dtype not in FLOATS:
        raise InputError(
            f"{name} is {dtype}, expected one of {', '.join(FLOATS)}",
            code="quantize.dtype",
            repair="this model is quantized or damaged: start from its float form",
        )


def write_units(
    source: Checkpoint, sources: Sources, shards: Shards, journal: Journal, promised: Manifest | None,
    make_layer: Callable[[int, Mapping[str, Part]], tuple[dict[str, Any], dict[str, Any]]], reporter: Reporter,
) -> Written:  # fmt: skip
    """Write all units that the journal does not have, and return everything that was written.

    `make_layer(unit, tensors)` writes a block and returns its line and the states behind it.
    """
    found = contents(source)
    shards.take_up(entries_of(journal.lines))
    reporter.start("quantizing", len(found.layers), "layers", done=max(0, min(journal.num_done - 1, len(found.layers))))
    for number in range(journal.num_done, len(found.layers) + 2):
        states: dict[str, Any] = {}
        if number == 0:
            line = write_plain(number, found.before, sources, shards, source, promised)
        elif number <= len(found.layers):
            line, states = make_layer(number, found.layers[number - 1])
            reporter.advance(1)
        else:
            line = write_plain(number, found.behind, sources, shards, source, promised)
            states = journal.states() if journal.has_states else {}
        journal.add(line, states)
    reporter.finish()
    written = Written(entries_of(journal.lines))
    for line in journal.lines:
        written.sources |= line["sources"]
        written.layers += [line["layer"]] if "layer" in line else []
    return written


def entries_of(lines: list[dict[str, Any]]) -> list[Entry]:
    """Return the tensors that lines of a journal tell of; JSON makes lists of shapes."""
    return [Entry(name, dtype, tuple(shape), *rest) for line in lines for name, dtype, shape, *rest in line["entries"]]
