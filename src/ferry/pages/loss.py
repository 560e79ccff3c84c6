"""The loss page: one HTML file that shows one or several training runs, with nothing to load and nothing to install.

Without a script it shows the loss as a still picture and all tables. With one (its own, inside the file) curves can be
smoothed, zoomed and read off. Long runs are thinned; the lowest and the highest loss of each stretch stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from ferry import __version__
from ferry.core.metrics import StepMetrics, Summary, smooth, summary
from ferry.core.units import duration_text, size_text
from ferry.pages.curves import RunCurves, Samples, marks_of
from ferry.pages.drawing import Curve, chart

NUM_COLOURS = 6
MAX_STEPS = 20_000
MAX_SAMPLES = 3


class Series(NamedTuple):
    """One small chart: the key of its numbers, its title, how its numbers are written."""

    key: str
    title: str
    unit: str


SERIES = (
    Series("lr", "Learning rate", "plain"),
    Series("grad_norm", "Gradient norm", "plain"),
    Series("tokens_per_s", "Real tokens per second", "count"),
    Series("peak_memory_bytes", "Peak memory of one rank", "bytes"),
    Series("padding_share", "Padding share", "share"),
    Series("step_s", "Seconds per step", "plain"),
)


def render_page(runs: Sequence[RunCurves], title: str) -> str:
    """Return the whole page for one run, or for several laid over each other."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("ferry.pages", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.filters |= {"size": size_text, "duration": duration_text}
    summaries = [summary(run.metrics) if run.metrics else None for run in runs]
    weight = default_smoothing(max((len(run.metrics) for run in runs), default=0))
    equal, different = _settings(runs)
    return templates.get_template("loss.html.j2").render(
        title=title,
        names=[run.name for run in runs],
        num_colours=NUM_COLOURS,
        tiles=_tiles(summaries[0], runs[0]) if len(runs) == 1 and summaries[0] else [],
        picture=_picture(runs, weight),
        series=SERIES,
        weight=weight,
        data=[_data(run) for run in runs],
        rows=_summary_rows(runs, summaries),
        equal=equal,
        different=different,
        events=[(run.name, marks_of(run)) for run in runs if any(mark.kind != "saved" for mark in marks_of(run))],
        samples=_samples(runs),
        version=__version__,
        now=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    )


def default_smoothing(num_steps: int) -> float:
    """Return a weight of the past that suits a run's length: short runs are shown nearly as they are."""
    return round(min(max(1 - 30 / max(num_steps, 1), 0.0), 0.97), 2)


def picture_of(runs: Sequence[RunCurves]) -> str:
    """Return the loss of some runs as one still SVG element, for other pages."""
    return _picture(runs, default_smoothing(max((len(run.metrics) for run in runs), default=0)))


def _picture(runs: Sequence[RunCurves], weight: float) -> str:
    raw, smoothed, dots = [], [], []
    for index, run in enumerate(runs):
        colour = f"m{index % NUM_COLOURS}"
        steps, losses = [float(m.step) for m in run.metrics], [m.loss for m in run.metrics]
        raw.append(Curve(list(zip(steps, losses, strict=True)), f"line raw {colour}"))
        smoothed.append(Curve(list(zip(steps, smooth(losses, weight), strict=True)), f"line {colour}"))
        points = [(float(point.step), point.validation_loss) for point in run.validation]
        dots.append(Curve(points, f"dot {colour}", is_dotted=True))
    marks = [mark for run in runs for mark in marks_of(run)] if len(runs) == 1 else []
    return chart([*raw, *smoothed, *dots], marks, "loss by step")


def _data(run: RunCurves) -> dict[str, Any]:
    """Return what the script draws of one run: columns of numbers, null where there is none."""
    steps = _kept(run.metrics)
    columns: dict[str, Callable[[StepMetrics], float]] = {
        "loss": lambda m: m.loss,
        "lr": lambda m: m.lr,
        "grad_norm": lambda m: m.grad_norm,
        "tokens_per_s": lambda m: m.tokens_per_s,
        "peak_memory_bytes": lambda m: m.peak_memory_bytes,
        "padding_share": lambda m: m.num_padding / max(m.num_padding + m.num_tokens, 1),
        "step_s": lambda m: m.step_s,
    }
    return {
        "name": run.name,
        "step": [m.step for m in steps],
        **{key: [_number(value(m)) for m in steps] for key, value in columns.items()},
        "validation": [[point.step, _number(point.validation_loss)] for point in run.validation],
        "marks": [list(mark[:3]) for mark in marks_of(run)],
    }


def _kept(metrics: Sequence[StepMetrics]) -> list[StepMetrics]:
    """Return all steps of a run of usual length; of a longer one its ends and the extremes of each stretch."""
    if len(metrics) <= MAX_STEPS:
        return list(metrics)
    num_buckets, kept = MAX_STEPS // 2, {0, len(metrics) - 1}
    for bucket in range(num_buckets):
        start, end = (index * len(metrics) // num_buckets for index in (bucket, bucket + 1))
        kept |= {extreme(range(start, end), key=lambda i: metrics[i].loss) for extreme in (min, max)}
    return [metrics[index] for index in sorted(kept)]


def _number(value: float) -> float | None:
    """Return six digits of a number: more than a screen can show, and half the bytes."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _tiles(s: Summary, run: RunCurves) -> list[tuple[str, str, str]]:
    """Return the numbers that stand on top of the page of one run: what, how much, and a remark."""
    tiles = [("loss", _loss(s.last_loss), f"from {_loss(s.first_loss)}")]
    if run.validation:
        last = run.validation[-1]
        tiles.append(("validation loss", _loss(last.validation_loss), f"after step {last.step}"))
    tiles.append(("steps", f"{run.metrics[-1].step:,}", f"{duration_text(s.median_step_s)} each (median)"))
    tiles.append(("real tokens", f"{s.num_tokens:,}", f"{s.padding_share:.1%} padding on top"))
    tiles.append(("tokens per second", f"{s.median_tokens_per_s:,.0f}", f"{s.cpu_ms_per_token:.2f} CPU ms each"))
    tiles.append(("peak memory", size_text(s.peak_memory_bytes), "the most of any rank"))
    return tiles


def _samples(runs: Sequence[RunCurves]) -> list[tuple[str, Samples]]:
    """Return the samples to show; those that several runs share are shown once."""
    shown: list[tuple[list[str], Samples]] = []
    for run in runs:
        samples = run.samples[:MAX_SAMPLES]
        names = next((names for names, others in shown if others == samples), None)
        if names is not None:
            names.append(run.name)
        elif samples:
            shown.append(([run.name], samples))
    return [(", ".join(names), samples) for names, samples in shown]


def _summary_rows(runs: Sequence[RunCurves], summaries: Sequence[Summary | None]) -> list[tuple[str, list[str]]]:
    texts: dict[str, Callable[[Summary], str]] = {
        "steps": lambda s: f"{s.num_steps:,}",
        "first loss": lambda s: _loss(s.first_loss),
        "last loss": lambda s: _loss(s.last_loss),
        "best loss": lambda s: f"{_loss(s.best_loss)} (step {s.best_step})",
        "median step": lambda s: duration_text(s.median_step_s),
        "real tokens": lambda s: f"{s.num_tokens:,}",
        "supervised tokens": lambda s: f"{s.num_supervised:,}",
        "padding share": lambda s: f"{s.padding_share:.1%}",
        "real tokens/s (median)": lambda s: f"{s.median_tokens_per_s:,.1f}",
        "tokens/s/p (median)": lambda s: f"{s.median_tokens_per_s_per_device:,.1f}",
        "MFU (median)": lambda s: "–" if s.median_mfu is None else f"{s.median_mfu:.1%}",
        "CPU per real token": lambda s: f"{s.cpu_ms_per_token:.3g} ms",
        "peak memory": lambda s: size_text(s.peak_memory_bytes),
        "time in steps": lambda s: duration_text(s.train_s),
        "restarts": lambda s: str(s.num_restarts),
    }
    rows = [(name, [text(s) if s else "–" for s in summaries]) for name, text in texts.items()]
    last = [_loss(run.validation[-1].validation_loss) if run.validation else "–" for run in runs]
    return [*rows[:4], ("last validation loss", last), *rows[4:]] if any(run.validation for run in runs) else rows


def _settings(runs: Sequence[RunCurves]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Return the settings that are the same in all runs, and those that are not."""
    flat = [_flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [(name, [values.get(name, "–") for values in flat]) for name in names]
    equal = [(name, values[0]) for name, values in rows if len(set(values)) == 1]
    return equal, [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as texts with dotted names; those that were left empty are left out."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            items = value if isinstance(value, list | tuple) else [value]
            rows[f"{prefix}{key}"] = ", ".join(_text(item) for item in items)
    return rows


def _text(value: object) -> str:
    """Return a setting as text. A page is made to be handed on: of an absolute path only the name is kept."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"…/{text.rstrip('/').rpartition('/')[2]}" if text.startswith("/") else text


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not a number"
