"""The quantized models of a voyage: how far each is from its original, what it saved, and where its page is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ferry.core.units import size_text
from ferry.pages.drawing import Curve, chart


@dataclass(frozen=True)
class Quantization:
    """One step that quantized: a few numbers, the error of each block as SVG, and its own page."""

    step: str
    form: str
    """Method, scheme and format, as far as they are told."""
    picture: str
    facts: tuple[tuple[str, str], ...]
    page: str
    link: str
    """The page as seen from the report; "" where it is not in the voyage's folder or is gone."""


def quantizations_of(entries: Iterable[Mapping[str, Any]], output: Path) -> list[Quantization]:
    """Return the steps whose result compares a quantized model with its original."""
    return [_quantization(entry, output) for entry in entries if {"kl", "top1"} <= entry["result"].keys()]


def _quantization(entry: Mapping[str, Any], output: Path) -> Quantization:
    result = entry["result"]
    proof = result.get("proof") or {}
    form = ", ".join(str(proof[key]) for key in ("method", "scheme", "format") if proof.get(key))
    page = str(result.get("page") or "")
    return Quantization(entry["name"], form, _picture(proof), _facts(result), page, _link(page, output))


def _facts(result: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float) and math.isfinite(value)}
    facts = []
    if "kl" in numbers:
        facts.append(("KL to the original", f"{numbers['kl']:.4g}"))
    if "top1" in numbers:
        facts.append(("top-1 agreement", f"{numbers['top1']:.1%}"))
    if {"perplexity", "perplexity_original"} <= numbers.keys():
        ratio = f" (× {numbers['perplexity_ratio']:.4g})" if "perplexity_ratio" in numbers else ""
        facts.append(("perplexity", f"{numbers['perplexity_original']:.4g} → {numbers['perplexity']:.4g}{ratio}"))
    if {"bytes", "bytes_original"} <= numbers.keys():
        facts.append(("size", f"{size_text(numbers['bytes_original'])} → {size_text(numbers['bytes'])}"))
    if isinstance(result.get("passed"), bool):
        facts.append(("limits", "all hold" if result["passed"] else "not all hold"))
    return tuple(facts)


def _picture(proof: Mapping[str, Any]) -> str:
    """Return the error of each block's output over the layers, as powers of ten."""
    errors = [(float(layer["layer"]), layer.get("nmse")) for layer in proof.get("layers") or ()]
    points = [(layer, math.log10(error)) for layer, error in errors if error is not None and 0 < error < math.inf]
    return chart([Curve(points, "line m0")], [], "error of each block, as a power of ten, by layer")


def _link(page: str, output: Path) -> str:
    path = Path(os.path.abspath(output / page))
    if not page or not path.is_file() or not path.is_relative_to(output):
        return ""
    return quote(path.relative_to(output).as_posix())
