"""The training runs of a voyage: their curves as still pictures, and how the loss on held-out data changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.pages.curves import is_run, read_run
from ferry.pages.loss import picture_of

SHOWN = (
    ("steps", "steps"),
    ("validation_perplexity_before", "held-out perplexity before"),
    ("validation_perplexity", "held-out perplexity after"),
)


@dataclass(frozen=True)
class Training:
    """One step that trained: its loss as SVG, and a few numbers."""

    step: str
    picture: str
    facts: tuple[tuple[str, str], ...]
    page: str
    """The interactive page, beside the run."""


def trainings_of(entries: Iterable[Mapping[str, Any]]) -> list[Training]:
    """Return the steps whose result names the directory of a training run that is still there."""
    found = []
    for entry in entries:
        output = entry["result"].get("output")
        if not isinstance(output, str) or not is_run(Path(output)):
            continue
        run = read_run(Path(output), entry["name"])
        page = str(entry["result"].get("report", ""))
        found.append(Training(entry["name"], picture_of([run]), _facts(entry["result"]), page))
    return found


def _facts(result: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    values = [(words, result.get(key)) for key, words in SHOWN]
    summary = result.get("summary") or {}
    values += [("loss of the first step", summary.get("first_loss")), ("of the last", summary.get("last_loss"))]
    values.append(("tokens/s", summary.get("median_tokens_per_s")))
    return tuple(
        (words, f"{value:.4g}" if isinstance(value, float) else str(value)) for words, value in values if value
    )
