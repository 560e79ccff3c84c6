"""A proof as rows that can be drawn and told: layers, kinds of linear layers, worst ones, errors as text.

A model of experts has tens of thousands of linear layers. The experts of a layer are one row a kind here, with the
worst of them named, so that the size of a page follows the number of layers. The proof itself keeps them all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FLOAT = "float"
NUMBER = re.compile(r"\.\d+(?=\.|$)")
EXPERT = re.compile(r"\.experts?\.(\d+)\.")
METHODS = {"smoothquant": "SmoothQuant", "awq": "AWQ", "rtn": "Round to nearest"}
LIMITS = {
    "kl": ("KL to the original", "at most", "mean over tokens of the divergence of the whole next-token distribution"),
    "top1": ("top-1 agreement", "at least", "how often the most likely next token is the same"),
    "perplexity_ratio": ("perplexity ratio", "at most", "perplexity of the quantized model over the original's"),
}
"""What each limit is called, on which side of it a good model lies, and what it measures."""


class Linear(NamedTuple):
    """One linear layer. `nmse` and `cosine` are of its output on the same input, None where nothing was measured."""

    layer: int
    name: str
    kind: str
    """What it is called within its layer, short: `q`, `down`, `expert down`."""
    scheme: str
    group: str
    """What it was smoothed together with; "" where nothing was."""
    strength: float | None
    nmse: float | None
    cosine: float | None
    weight_nmse: float | None
    reason: str

    @property
    def is_float(self) -> bool:
        return self.scheme == FLOAT


class Kind(NamedTuple):
    """The linear layers of one kind in one layer: usually one, or all experts."""

    layer: int
    kind: str
    group: str
    linears: tuple[Linear, ...]
    """The quantized ones with the largest error last, then those kept in float."""

    def errors(self, of_weights: bool) -> list[float]:
        """Return the errors that are known, in ascending order."""
        return known(error_of(linear, of_weights) for linear in self.linears if not linear.is_float)

    @property
    def num_float(self) -> int:
        return sum(linear.is_float for linear in self.linears)


def is_measured(proof: Mapping[str, Any]) -> bool:
    """Return whether outputs were compared; otherwise there are errors of weights only."""
    outputs = (one.get("nmse") for layer in proof["layers"] for one in (layer, *layer["linears"]))
    return any(error is not None for error in outputs)


def linears_of(proof: Mapping[str, Any]) -> list[Linear]:
    """Return every linear layer of a proof, layer by layer."""
    return [_linear(layer["layer"], values) for layer in proof["layers"] for values in layer["linears"]]


def kinds_of(linears: Iterable[Linear]) -> list[Kind]:
    """Return linear layers put together by layer and kind, in their order."""
    found: dict[tuple[int, str], list[Linear]] = {}
    for linear in linears:
        found.setdefault((linear.layer, linear.kind), []).append(linear)
    return [
        Kind(layer, kind, members[0].group, tuple(sorted(members, key=_by_error)))
        for (layer, kind), members in found.items()
    ]


def worst(linears: Iterable[Linear], of_weights: bool, num_wanted: int) -> list[Linear]:
    """Return the linear layers with the largest errors, the worst first."""
    measured = [linear for linear in linears if not linear.is_float and error_of(linear, of_weights) is not None]
    return sorted(measured, key=lambda linear: -(error_of(linear, of_weights) or 0.0))[:num_wanted]


def error_of(linear: Linear, of_weights: bool) -> float | None:
    """Return the error of a linear layer's output, or of its weights."""
    return linear.weight_nmse if of_weights else linear.nmse


def known(values: Iterable[float | None]) -> list[float]:
    """Return the values that are numbers, in ascending order."""
    return sorted(value for value in values if value is not None and math.isfinite(value))


def error_text(value: float | None) -> str:
    """Return an error as `1.2e-5`."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}" if value else "0"


def number_text(value: float | None) -> str:
    """Return a number with four significant digits."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return error_text(value) if 0 < abs(value) < 1e-4 else f"{value:.4g}"


def limit_text(name: str, value: float | None) -> str:
    """Return a measured value or a limit as people say it: top-1 is a share, the others are numbers."""
    is_share = name == "top1" and value is not None and math.isfinite(value)
    return f"{100 * (value or 0):.4g} %" if is_share else number_text(value)


def _linear(layer: int, values: Mapping[str, Any]) -> Linear:
    name = str(values["name"])
    last = name.rpartition(".")[2]
    kind = last.removesuffix("_proj")
    return Linear(
        layer=layer,
        name=name,
        kind=f"expert {kind}" if EXPERT.search(name) else kind,
        scheme=values["scheme"],
        group=NUMBER.sub("", f".{values.get('group') or ''}").strip("."),
        strength=values.get("strength"),
        nmse=values.get("nmse"),
        cosine=values.get("cosine"),
        weight_nmse=values.get("weight_nmse"),
        reason=values.get("reason") or "",
    )


def _by_error(linear: Linear) -> tuple[bool, float]:
    error = linear.nmse if linear.nmse is not None else linear.weight_nmse
    return linear.is_float, error if error is not None else 0.0
