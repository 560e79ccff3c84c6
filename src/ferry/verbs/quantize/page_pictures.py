"""The pictures of a proof as still SVG: errors over layers, chosen strengths, KL by window, what experts have seen.

Layers go from left to right in all of them. Each layer has one invisible column on top that carries its numbers as a
title: a reader without script sees it as a tooltip, the page's own script writes it above the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from ferry.pages.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Frame, ticks
from ferry.verbs.quantize.page_rows import Kind, Linear, error_of, error_text, known, number_text

NUM_TONES = 5
"""Tone 0 is the whole block's; kinds share the others."""
NUM_SHAPES = 4
LANE = 20
SIDE = 128
"""Room for names at the left of a strip."""
ROW = 26
SMALL_WIDTH, SMALL_HEIGHT = 540, 190
NUM_SHADES = 6
MAX_NAMED = 12


class Look(NamedTuple):
    """How a kind of linear layer is drawn: kinds that are smoothed together share a tone."""

    kind: str
    tone: int
    shape: int


class Columns(NamedTuple):
    """One column for each layer, between a left and a right edge."""

    layers: Sequence[int]
    left: float
    right: float

    @property
    def width(self) -> float:
        return (self.right - self.left) / len(self.layers)

    def start(self, layer: int) -> float:
        return self.left + self.layers.index(layer) * self.width


def looks_of(kinds: Iterable[Kind]) -> dict[str, Look]:
    """Return how each kind is drawn."""
    found: dict[str, Look] = {}
    families: dict[str, int] = {}
    for one in kinds:
        if one.kind not in found:
            tone = 1 + families.setdefault(one.group or one.kind, len(families)) % NUM_TONES
            shape = sum(look.tone == tone for look in found.values()) % NUM_SHAPES
            found[one.kind] = Look(one.kind, tone, shape)
    return found


def sign(look: Look) -> Markup:
    """Return the mark of a kind, for the legend."""
    path = f'<path class="spots m{look.tone}" d="{_spot(look, 6, 6)}"/>'
    return Markup(f'<svg class="token" viewBox="0 0 12 12" aria-hidden="true">{path}</svg>')


def error_picture(layers: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], of_weights: bool) -> Markup:
    """Return the errors over layers on a log scale: a line for the blocks, a mark for each kind of linear layer."""
    blocks = {} if of_weights else {layer["layer"]: layer.get("nmse") for layer in layers}
    values = known([*blocks.values(), *(error for one in kinds for error in one.errors(of_weights))])
    logs = [math.log10(value) for value in values if value > 0]
    if not logs:
        return Markup("")
    room = max((logs[-1] - logs[0]) * 0.05, 0.1)
    frame = Frame(0, 1, logs[0] - room, logs[-1] + room)
    columns = Columns([layer["layer"] for layer in layers], LEFT, WIDTH - RIGHT)
    has_lane = any(one.num_float for one in kinds)
    height = HEIGHT + (LANE if has_lane else 0)
    parts = [_svg(WIDTH, height, "error by layer"), *_log_rules(frame), *_layer_numbers(columns, height)]
    looks = looks_of(kinds)
    for order, (kind, look) in enumerate(looks.items()):
        shift = 0.1 + 0.8 * (order + 0.5) / len(looks) if columns.width >= 9 else 0.5
        parts += _marks([one for one in kinds if one.kind == kind], look, shift, (frame, columns), of_weights)
    parts += _block_line(blocks, frame, columns)
    if has_lane:
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{HEIGHT - BOTTOM + 17}">float</text>')
    by_layer: dict[int, list[Kind]] = {}
    for one in kinds:
        by_layer.setdefault(one.layer, []).append(one)
    for layer in layers:
        title = _layer_title(layer, by_layer.get(layer["layer"], []), of_weights)
        parts.append(_column(columns, layer["layer"], TOP, height - BOTTOM, title))
    return Markup("".join([*parts, "</svg>"]))


def strength_picture(linears: Sequence[Linear]) -> Markup:
    """Return the strength that was chosen for each group of each layer, or nothing where nothing was smoothed."""
    smoothed = {one.group for one in linears if one.strength is not None}
    groups = [group for group in dict.fromkeys(one.group for one in linears) if group in smoothed]
    if not groups:
        return Markup("")
    columns = Columns(sorted({one.layer for one in linears}), SIDE, WIDTH - RIGHT)
    cells: dict[tuple[str, int], list[Linear]] = {}
    for one in linears:
        cells.setdefault((one.group, one.layer), []).append(one)
    height = TOP + ROW * len(groups) + BOTTOM
    parts = [_svg(WIDTH, height, "strength by layer"), *_layer_numbers(columns, height)]
    for row, group in enumerate(groups):
        y = TOP + row * ROW
        parts.append(f'<text class="tick" x="6" y="{y + 17}">{escape(group.replace("->", " → "))}</text>')
        parts += [_cell(columns, layer, y, cells.get((group, layer), [])) for layer in columns.layers]
    for layer in columns.layers:
        lines = [f"{group}: {_strength(cells.get((group, layer), []))}" for group in groups]
        parts.append(_column(columns, layer, TOP, height - BOTTOM, "\n".join([f"layer {layer}", *lines])))
    return Markup("".join([*parts, "</svg>"]))


def windows_picture(found: Sequence[float | None]) -> Markup:
    """Return a bar for each window of held-out text, and the mean as a line; one that is no number is a full bar."""
    values = [math.nan if value is None else value for value in found]
    good = known(values)
    if not good or good[-1] <= 0:
        return Markup("")
    mean, top = sum(good) / len(good), good[-1] * 1.12
    base, step = SMALL_HEIGHT - BOTTOM, (SMALL_WIDTH - LEFT - RIGHT) / len(values)
    parts = [_svg(SMALL_WIDTH, SMALL_HEIGHT, "KL by window")]
    for tick in ticks(0, top, 4):
        y = base - tick / top * (base - TOP)
        parts += _rule(LEFT, SMALL_WIDTH - RIGHT, y, f"{tick:.3g}")
    width = min(step * 0.72, 64)
    every = math.ceil(len(values) / 12)
    for index, value in enumerate(values):
        x, share = LEFT + (index + 0.5) * step, value / top if math.isfinite(value) else 1.0
        y = base - share * (base - TOP)
        style = "bar m0" if math.isfinite(value) else "bar m0 lost"
        parts.append(
            f'<rect class="{style}" x="{x - width / 2:.1f}" y="{y:.1f}" '
            f'width="{width:.1f}" height="{base - y:.1f}">'
            f"<title>window {index + 1}: {number_text(value)}</title></rect>"
        )
        if index % every == 0:
            parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{base + 18}">{index + 1}</text>')
    y = base - mean / top * (base - TOP)
    parts.append(f'<path class="mean" d="M{LEFT} {y:.1f}H{SMALL_WIDTH - RIGHT}"/>')
    return Markup("".join([*parts, "</svg>"]))


def spread_picture(linears: Sequence[Linear], of_weights: bool) -> Markup:
    """Return how many linear layers have which error, in thirds of a power of ten."""
    errors = [value for value in known(error_of(one, of_weights) for one in linears if not one.is_float) if value > 0]
    if not errors:
        return Markup("")
    counts: dict[int, int] = {}
    for value in errors:
        bucket = math.floor(math.log10(value) * 3)
        counts[bucket] = counts.get(bucket, 0) + 1
    low, high = min(counts) // 3 * 3, (max(counts) // 3 + 1) * 3
    base, step = SMALL_HEIGHT - BOTTOM, (SMALL_WIDTH - LEFT - RIGHT) / (high - low)
    top = max(counts.values()) * 1.08
    parts = [_svg(SMALL_WIDTH, SMALL_HEIGHT, "number of linear layers by error")]
    for tick in ticks(0, top, 4):
        if tick == int(tick):
            parts += _rule(LEFT, SMALL_WIDTH - RIGHT, base - tick / top * (base - TOP), f"{tick:,.0f}")
    for bucket, count in sorted(counts.items()):
        height = max(count / top * (base - TOP), 1.5)
        title = f"{count:,} from {error_text(10 ** (bucket / 3))} to {error_text(10 ** ((bucket + 1) / 3))}"
        parts.append(
            f'<rect class="bar m0" x="{LEFT + (bucket - low) * step + 1:.1f}" y="{base - height:.1f}" '
            f'width="{step - 2:.1f}" height="{height:.1f}"><title>{title}</title></rect>'
        )
    for power in range(low // 3, high // 3 + 1):
        x = LEFT + (power * 3 - low) * step
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{base + 18}">1e{power}</text>')
    return Markup("".join([*parts, "</svg>"]))


def experts_picture(experts: Sequence[Mapping[str, Any]]) -> Markup:
    """Return a field of layers by experts: the darker, the more tokens an expert has seen in calibration."""
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for one in experts:
        by_layer.setdefault(one["layer"], []).append(one)
    num_rows = max(one["expert"] for one in experts) + 1
    row = min(18.0, max(4.0, 400 / num_rows))
    columns = Columns(sorted(by_layer), LEFT, WIDTH - RIGHT)
    gap = 1 if columns.width >= 5 else 0
    height = TOP + round(row * num_rows) + BOTTOM
    shades: list[list[str]] = [[] for _ in range(NUM_SHADES)]
    fell: list[str] = []
    for layer, members in by_layer.items():
        fair = max(sum(one["tokens"] for one in members) / len(members), 1)
        for one in members:
            place = f"M{columns.start(layer):.1f} {TOP + (one['expert'] + 0.5) * row:.1f}h{columns.width - gap:.1f}"
            share = min(one["tokens"] / fair / 2, 1)
            (fell if one["fell_back"] else shades[math.ceil(share * (NUM_SHADES - 1))]).append(place)
    parts = [_svg(WIDTH, height, "tokens seen by experts"), *_layer_numbers(columns, height)]
    thick = f'stroke-width="{row - (1 if row >= 5 else 0):.1f}"'
    for shade, places in enumerate(shades):
        opacity = 0.06 + 0.9 * shade / (NUM_SHADES - 1)
        parts.append(f'<path class="seen" {thick} stroke-opacity="{opacity:.2f}" d="{"".join(places)}"/>')
    parts.append(f'<path class="fell" {thick} d="{"".join(fell)}"/>')
    for expert in ticks(0, max(num_rows - 1, 1), 6):
        y = TOP + (expert + 0.5) * row + 4
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{y:.1f}">{expert:.0f}</text>')
    for layer, members in by_layer.items():
        parts.append(_column(columns, layer, TOP, height - BOTTOM, f"layer {layer}\n{seen_text(members)}"))
    return Markup("".join([*parts, "</svg>"]))


def seen_text(members: Sequence[Mapping[str, Any]]) -> str:
    """Return what the experts of one layer have seen, in words."""
    tokens = sorted(one["tokens"] for one in members)
    fell = [str(one["expert"]) for one in members if one["fell_back"]]
    named = ", ".join(fell[:MAX_NAMED]) + (" …" if len(fell) > MAX_NAMED else "")
    text = f"{len(members)} experts saw {tokens[0]:,} to {tokens[-1]:,} tokens (median {tokens[len(tokens) // 2]:,})"
    return f"{text}\n{len(fell)} fell back: {named}" if fell else text


def _svg(width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'


def _rule(left: float, right: float, y: float, text: str) -> Iterator[str]:
    yield f'<line class="rule" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    yield f'<text class="tick" text-anchor="end" x="{left - 8}" y="{y + 4:.1f}">{text}</text>'


def _log_rules(frame: Frame) -> Iterator[str]:
    digits = (1,) if frame.high_y - frame.low_y >= 3 else (1, 2, 5)
    for power in range(math.floor(frame.low_y), math.ceil(frame.high_y) + 1):
        for digit in digits:
            y = power + math.log10(digit)
            if frame.low_y <= y <= frame.high_y:
                yield from _rule(LEFT, WIDTH - RIGHT, frame.down(y), f"{digit}e{power}")


def _layer_numbers(columns: Columns, height: int) -> Iterator[str]:
    every = max(math.ceil(34 / columns.width), 1)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, every) if step >= every)
    for layer in columns.layers:
        if layer % every == 0:
            x = columns.start(layer) + columns.width / 2
            yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{height - 8}">{layer}</text>'


def _column(columns: Columns, layer: int, top: float, bottom: float, title: str) -> str:
    return (
        f'<rect class="column" x="{columns.start(layer):.1f}" width="{columns.width:.1f}" y="{top}" '
        f'height="{bottom - top}"><title>{escape(title)}</title></rect>'
    )


def _marks(
    kinds: Sequence[Kind], look: Look, shift: float, place: tuple[Frame, Columns], of_weights: bool
) -> Iterator[str]:
    """Give the marks of one kind in all layers: at its error, with a bar from least to most where there are several.

    `shift` is the place within a column, so that kinds do not cover each other.
    """
    frame, columns = place
    spots, bars, floats = [], [], []
    for one in kinds:
        x = columns.start(one.layer) + columns.width * shift
        errors = one.errors(of_weights)
        if errors:
            levels = [_down(frame, errors[index]) for index in (0, len(errors) // 2, -1)]
            spots.append(_spot(look, x, levels[1]))
            if len(errors) > 1:
                bars.append(f"M{x:.1f} {levels[0]:.1f}V{levels[2]:.1f}")
        if one.num_float:
            floats.append(_spot(look, x, HEIGHT - BOTTOM + 13))
    if bars:
        yield f'<path class="reach m{look.tone}" d="{"".join(bars)}"/>'
    yield f'<path class="spots m{look.tone}" d="{"".join(spots)}"/>'
    if floats:
        yield f'<path class="spots kept m{look.tone}" d="{"".join(floats)}"/>'


def _spot(look: Look, x: float, y: float) -> str:
    if look.shape == 0:
        return f"M{x - 2.8:.1f} {y:.1f}a2.8 2.8 0 1 0 5.6 0a2.8 2.8 0 1 0-5.6 0z"
    if look.shape == 1:
        return f"M{x - 2.5:.1f} {y - 2.5:.1f}h5v5h-5z"
    if look.shape == 2:
        return f"M{x:.1f} {y - 3.2:.1f}l3.2 5.6h-6.4z"
    return f"M{x:.1f} {y - 3.4:.1f}l3.4 3.4-3.4 3.4-3.4-3.4z"


def _down(frame: Frame, value: float) -> float:
    """Return the place of an error; one of zero, which has no logarithm, stands on the floor."""
    return frame.down(max(math.log10(value), frame.low_y) if value > 0 else frame.low_y)


def _block_line(blocks: Mapping[int, float | None], frame: Frame, columns: Columns) -> Iterator[str]:
    text, is_down = "", False
    for layer, value in blocks.items():
        if value is None or not math.isfinite(value):
            is_down = False
            continue
        x = columns.start(layer) + columns.width / 2
        text += f"{'L' if is_down else 'M'}{x:.1f} {_down(frame, value):.1f}"
        is_down = True
    if text:
        yield f'<path class="line m0" d="{text}"/>'


def _layer_title(layer: Mapping[str, Any], kinds: Sequence[Kind], of_weights: bool) -> str:
    lines = [f"layer {layer['layer']}"]
    if not of_weights:
        lines.append(f"block {error_text(layer.get('nmse'))}")
    for one in kinds:
        errors = one.errors(of_weights)
        if len(errors) > 1:
            lines.append(f"{one.kind} {error_text(errors[0])} to {error_text(errors[-1])}")
        elif errors:
            lines.append(f"{one.kind} {error_text(errors[0])}")
        if one.num_float:
            lines.append(f"{one.kind} float" + (f" ({one.num_float})" if one.num_float > 1 else ""))
    return "\n".join(lines)


def _cell(columns: Columns, layer: int, y: float, members: Sequence[Linear]) -> str:
    strengths = known(one.strength for one in members)
    if not members:
        return ""
    place = f'x="{columns.start(layer) + 0.5:.1f}" y="{y + 1}" width="{columns.width - 1:.1f}" height="{ROW - 2}"'
    if not strengths:
        return f'<rect class="empty" {place}/>'
    mean = sum(strengths) / len(strengths)
    rect = f'<rect class="heat" fill-opacity="{0.08 + 0.88 * min(max(mean, 0), 1):.2f}" {place}/>'
    if columns.width < 26:
        return rect
    style = "tick over" if mean > 0.55 else "tick under"
    x = columns.start(layer) + columns.width / 2
    return f'{rect}<text class="{style}" text-anchor="middle" x="{x:.1f}" y="{y + 17}">{mean:.2g}</text>'


def _strength(members: Sequence[Linear]) -> str:
    strengths = known(one.strength for one in members)
    if not strengths:
        return "kept in float" if members and all(one.is_float for one in members) else "not smoothed"
    low, high = strengths[0], strengths[-1]
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
