"""The screen after `ferry quantize`: what was made, how far it is from the original, where the proof is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ferry.core.units import size_text
from ferry.core.verb import Result
from ferry.verbs.quantize.page_rows import (
    LIMITS,
    METHODS,
    error_of,
    error_text,
    is_measured,
    known,
    limit_text,
    linears_of,
    number_text,
    worst,
)

BLOCKS = "▁▂▃▄▅▆▇█"
MAX_BARS = 40
NUM_WORST = 3


def exit_status(result: Result) -> int:
    """Return 1 for a model beyond its limits: it was made, and is there to be looked at."""
    return 0 if result.get("passed", True) else 1


def report(result: Result) -> str:
    """Return the screen for people."""
    proof: Mapping[str, Any] | None = result.get("proof")
    lines = [_headline(result, proof)]
    if result.get("bytes") and result.get("bytes_original"):
        before, after = result["bytes_original"], result["bytes"]
        lines.append(f"  size        {size_text(before)} -> {size_text(after)} ({after / before:.0%})")
    if proof:
        lines += _proof_lines(proof)
    if result.get("model_sha256"):
        lines.append(f"  sha256      {result['model_sha256']}")
    if result.get("scales") and result["action"] != "scales":
        lines.append(f"  scales      {result['scales']}")
    if result.get("page"):
        lines.append(f"  page        {result['page']}")
    changes: Sequence[str] = result.get("changes") or ()
    lines += [f"changed: {change}" for change in changes]
    lines += [f"note: {choice}" for choice in result.get("choices") or () if choice not in changes]
    if not result.get("passed", True):
        lines.append("the model was made, and is beyond its limits: the exit status is 1")
    return "\n".join(lines)


def bars(values: Sequence[float | None], num_bars: int = MAX_BARS) -> str:
    """Return errors as a strip of bars on a log scale, the largest of each stretch; a gap where nothing is known."""
    num_bars = min(num_bars, len(values))
    edges = [index * len(values) // num_bars for index in range(num_bars + 1)] if num_bars else []
    stretches = [known(values[start:end]) for start, end in pairwise(edges)]
    logs = [math.log10(found[-1]) if found and found[-1] > 0 else -math.inf for found in stretches]
    finite = [value for value in logs if math.isfinite(value)]
    low, span = min(finite, default=0.0), (max(finite, default=0.0) - min(finite, default=0.0)) or 1.0
    top = len(BLOCKS) - 1
    levels = [round((value - low) / span * top) if math.isfinite(value) else 0 for value in logs]
    return "".join(BLOCKS[level] if found else " " for level, found in zip(levels, stretches, strict=True))


def _headline(result: Result, proof: Mapping[str, Any] | None) -> str:
    what = _what(proof) if proof else ""
    if result["action"] == "scales":
        return f"made scales{what} -> {result['scales']}"
    if result["action"] == "dequantize":
        return f"made float again -> {result['artifact']}"
    if result["action"] == "repack":
        form = f" as {proof['format']}" if proof else " in another format"
        return f"the same integers{form} -> {result['artifact']}"
    return f"quantized{what} -> {result['artifact']}"


def _what(proof: Mapping[str, Any]) -> str:
    method = METHODS.get(proof["method"], proof["method"])
    return f" {proof['model']}: {method}, {proof['scheme']}, {proof['format']}"


def _proof_lines(proof: Mapping[str, Any]) -> Iterator[str]:
    whole = proof.get("whole")
    if whole:
        limits = {limit["name"]: limit for limit in proof["limits"]}
        yield f"  KL          {number_text(whole['kl'])}{_limit(limits.get('kl'))}"
        yield f"  top-1       {limit_text('top1', whole['top1'])}{_limit(limits.get('top1'))}"
        before, after = number_text(whole["perplexity_original"]), number_text(whole["perplexity"])
        ratio = f"ratio {number_text(whole['perplexity_ratio'])}{_limit(limits.get('perplexity_ratio'))}"
        yield f"  perplexity  {before} -> {after}, {ratio}"
    elif proof["layers"]:
        yield "  not measured on text: only the weights were compared"
    yield from _error_lines(proof)


def _limit(limit: Mapping[str, Any] | None) -> str:
    if limit is None:
        return ""
    text = f"{LIMITS[limit['name']][1]} {limit_text(limit['name'], limit['limit'])}"
    return f" ({text})" if limit["passed"] else f" - NOT {text}"


def _error_lines(proof: Mapping[str, Any]) -> Iterator[str]:
    outputs = [layer.get("nmse") for layer in proof["layers"]]
    errors = known(outputs)
    if errors:
        yield f"  layers      {bars(outputs)} NMSE {error_text(errors[0])} to {error_text(errors[-1])}"
    linears = linears_of(proof)
    of_weights = not is_measured(proof)
    for index, one in enumerate(worst(linears, of_weights, NUM_WORST)):
        yield f"  {'' if index else 'worst':10}  {one.name}  NMSE {error_text(error_of(one, of_weights))}"
    num_float = sum(one.is_float for one in linears)
    if num_float:
        yield f"  in float    {num_float:,} of {len(linears):,} linear layers"
    experts = proof.get("experts") or []
    num_fallen = sum(bool(one["fell_back"]) for one in experts)
    if num_fallen:
        yield f"  experts     {num_fallen:,} of {len(experts):,} saw too few tokens and were rounded plainly"
