"""A curve as still SVG, for a reader without scripts. The script draws the same picture again, and makes it move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from ferry.pages.curves import Mark

WIDTH, HEIGHT = 1120, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 28
NUM_BUCKETS = 350

Point = tuple[float, float]


class Curve(NamedTuple):
    """Points in order of x, and the class that gives them their colour. With `is_dotted` they are not joined."""

    points: Sequence[Point]
    style: str
    is_dotted: bool = False


class Frame(NamedTuple):
    """The window of values that a chart shows."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def across(self, x: float) -> float:
        share = min(max((x - self.low_x) / (self.high_x - self.low_x), 0.0), 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)


def chart(curves: Sequence[Curve], marks: Sequence[Mark], label: str) -> Markup:
    """Return a chart as one SVG element, or nothing if there is no number to show."""
    points = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    if not points:
        return Markup("")
    frame = Frame(*_span([x for x, _ in points], margin=0.0), *_span([y for _, y in points], margin=0.05))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">', *_axes(frame)]
    parts += [_mark(mark, frame) for mark in marks]
    for curve in curves:
        parts += _dots(curve, frame) if curve.is_dotted else _lines(curve, frame)
    return Markup("".join([*parts, "</svg>"]))


def ticks(low: float, high: float, num_wanted: int) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) between two values, about as many as wanted."""
    rough = (high - low) / num_wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.7)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * margin or (0.0 if high > low else max(abs(low) * 0.05, 0.5))
    return low - room, high + room


def _axes(frame: Frame) -> Iterator[str]:
    for value in ticks(frame.low_y, frame.high_y, 5):
        y = frame.down(value)
        yield f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{value:.6g}</text>'
    for value in ticks(frame.low_x, frame.high_x, 8):
        x = frame.across(value)
        yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 8}">{value:.6g}</text>'


def _mark(mark: Mark, frame: Frame) -> str:
    x, bottom = frame.across(mark.step), HEIGHT - BOTTOM
    top = bottom - 7 if mark.kind == "saved" else TOP
    title = f"<title>{escape(mark.kind)} at step {mark.step} {escape(mark.text)}</title>"
    return f'<line class="mark {escape(mark.kind)}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}">{title}</line>'


def _dots(curve: Curve, frame: Frame) -> Iterator[str]:
    for x, y in curve.points:
        if math.isfinite(y):
            yield f'<circle class="{curve.style}" cx="{frame.across(x):.1f}" cy="{frame.down(y):.1f}" r="4"/>'


def _lines(curve: Curve, frame: Frame) -> Iterator[str]:
    """Give a path for each stretch without gaps."""
    stretch: list[str] = []
    for x, y in (*_thinned(curve.points), (0.0, math.nan)):
        if math.isfinite(y):
            stretch.append(f"{frame.across(x):.1f} {frame.down(y):.1f}")
        elif stretch:
            yield f'<path class="{curve.style}" d="M{"L".join(stretch)}"/>'
            stretch = []


def _thinned(points: Sequence[Point]) -> Iterator[Point]:
    """Give the lowest and the highest point of each of a few hundred stretches: peaks stay."""
    if len(points) <= 2 * NUM_BUCKETS:
        yield from points
        return
    for bucket in range(NUM_BUCKETS):
        start, end = (index * len(points) // NUM_BUCKETS for index in (bucket, bucket + 1))
        known = [point for point in points[start:end] if math.isfinite(point[1])]
        if not known:
            yield points[start]
            continue
        yield from sorted({min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])})
