"""Samples shown to a person: what the model will see, with the part it learns marked.

They are read back from the stored tokens, not from the rows: what is shown is what is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from ferry.data.rendering import Tokens

Shown = list[tuple[str, bool]]
"""One sample as spans of text, each with whether it is supervised."""


def shown_indices(num_samples: int) -> list[int]:
    """Return the first, the middle and the last sample."""
    return sorted({0, num_samples // 2, num_samples - 1})


def shown(sample: Tokens, tokenizer: Any) -> Shown:
    """Return a sample as spans of text."""
    edges = np.flatnonzero(np.diff(sample.supervised_T)) + 1
    bounds = [0, *edges.tolist(), len(sample.ids_T)]
    spans: Shown = []
    for first, last in pairwise(bounds):
        if last > first:
            text = tokenizer.decode(sample.ids_T[first:last].tolist(), skip_special_tokens=False)
            spans.append((text, bool(sample.supervised_T[first])))
    return spans


def samples_text(samples: Iterable[Shown], *, max_chars: int = 1200, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
    """Return samples as plain text, the supervised part between marks. Long spans are cut in the middle."""
    blocks: list[str] = []
    for number, spans in enumerate(samples, start=1):
        limit = max_chars // max(len(spans), 1)
        parts = [
            f"{marks[0]}{_cut(text, limit)}{marks[1]}" if learned else _cut(text, limit) for text, learned in spans
        ]
        blocks.append(f"--- sample {number} ---\n{''.join(parts)}")
    return "\n".join(blocks)


def _cut(text: str, limit: int) -> str:
    if len(text) <= max(limit, 80):
        return text
    half = max(limit, 80) // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
