"""The page of a quantized model: one HTML file that shows its proof, with nothing to load and nothing to install.

It reads without a script; with one (its own, inside the file) pictures are read off and the table is sorted. The same
proof gives the same bytes. A model with more linear layers than a page can list is told by layer and kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ferry import __version__
from ferry.core.units import duration_text, size_text
from ferry.verbs.quantize import page_pictures as pictures
from ferry.verbs.quantize.page_rows import (
    LIMITS,
    METHODS,
    Kind,
    Linear,
    error_of,
    error_text,
    is_measured,
    kinds_of,
    known,
    limit_text,
    linears_of,
    number_text,
    worst,
)

MAX_ROWS = 2000
NUM_WORST = 10


class Tile(NamedTuple):
    """A number that stands on top of the page, with a remark under it."""

    name: str
    value: str
    remark: str


class Verdict(NamedTuple):
    """`mood` is good, plain or bad."""

    mood: str
    text: str
    detail: str


def page(proof: Mapping[str, Any]) -> str:
    """Return the whole page."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader("ferry.verbs.quantize", "."), PackageLoader("ferry.pages", ".")])
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters |= {"size": size_text, "duration": duration_text, "thousands": "{:,}".format}
    templates.filters |= {"error": error_text, "number": number_text}
    linears = linears_of(proof)
    kinds = kinds_of(linears)
    of_weights = not is_measured(proof)
    experts = proof.get("experts") or []
    whole = proof.get("whole")
    return templates.get_template("quantization.html.j2").render(
        proof=proof,
        title=title(proof),
        verdict=verdict_of(proof),
        tiles=_tiles(proof, linears, of_weights),
        whole=whole,
        limits=[_limit(limit) for limit in proof["limits"]],
        of_weights=of_weights,
        error_picture=pictures.error_picture(proof["layers"], kinds, of_weights),
        looks=[(look.kind, pictures.sign(look)) for look in pictures.looks_of(kinds).values()],
        num_float=sum(one.is_float for one in linears),
        num_linears=len(linears),
        self_check=max(known(layer.get("self_check_nmse") for layer in proof["layers"]), default=None),
        strength_picture=pictures.strength_picture(linears),
        windows_picture=pictures.windows_picture(whole["kl_by_window"]) if whole else "",
        spread_picture=pictures.spread_picture(linears, of_weights),
        worst=[(one, error_of(one, of_weights)) for one in worst(linears, of_weights, NUM_WORST)],
        has_reasons=any(one.reason for one in linears),
        rows=linears if len(linears) <= MAX_ROWS else [],
        kinds=[_kind_row(one) for one in kinds] if len(linears) > MAX_ROWS else [],
        experts=_expert_rows(experts),
        experts_picture=pictures.experts_picture(experts) if experts else "",
        num_fallen=sum(bool(one["fell_back"]) for one in experts),
        facts=_facts(proof),
        version=__version__,
    )


def title(proof: Mapping[str, Any]) -> str:
    """Return what was made, in a few words: `smol: SmoothQuant W8A8`."""
    method = METHODS.get(proof["method"], proof["method"])
    return f"{proof['model']}: {method} {proof['scheme']}"


def verdict_of(proof: Mapping[str, Any]) -> Verdict:
    """Return what the limits say; a model that was never run on text is not said to be good."""
    if not proof.get("whole"):
        return Verdict("plain", "Not measured on text", "There was no held-out text: only the weights were compared.")
    broken = [
        f"{LIMITS.get(limit['name'], (limit['name'],))[0]} {limit_text(limit['name'], limit['value'])}, "
        f"limit {limit_text(limit['name'], limit['limit'])}"
        for limit in proof["limits"]
        if not limit["passed"]
    ]
    if broken:
        return Verdict("bad", "Beyond its limits", "; ".join(broken))
    tokens = f"measured on {proof['whole']['tokens']:,} tokens that calibration has not seen"
    return Verdict("good", "Within its limits", tokens)


def _tiles(proof: Mapping[str, Any], linears: Sequence[Linear], of_weights: bool) -> list[Tile]:
    tiles = []
    if whole := proof.get("whole"):
        remark = f"99 % of tokens below {number_text(whole['kl_p99'])}"
        tiles.append(Tile("KL to the original", number_text(whole["kl"]), remark))
        tiles.append(Tile("top-1 agreement", limit_text("top1", whole["top1"]), "same most likely next token"))
        values = f"{number_text(whole['perplexity_original'])} → {number_text(whole['perplexity'])}"
        tiles.append(Tile("perplexity", values, f"× {number_text(whole['perplexity_ratio'])}"))
    before, after = proof["bytes"]["original"], proof["bytes"]["quantized"]
    share = f", {after / before:.0%} of it" if before else ""
    tiles.append(Tile("size", size_text(after), f"from {size_text(before)}{share}"))
    measured = [layer for layer in proof["layers"] if known([layer.get("nmse")])]
    if measured:
        last = max(measured, key=lambda layer: layer["nmse"])
        tiles.append(Tile("worst layer", f"{last['layer']}", f"NMSE {error_text(last['nmse'])} of its output"))
    elif found := worst(linears, of_weights, 1):
        remark = f"NMSE {error_text(found[0].weight_nmse)}, {found[0].kind}"
        tiles.append(Tile("worst weight in layer", str(found[0].layer), remark))
    return tiles


def _limit(limit: Mapping[str, Any]) -> dict[str, Any]:
    name = limit["name"]
    words, side, meaning = LIMITS.get(name, (name, "limit", ""))
    return {
        "words": words,
        "meaning": meaning,
        "value": limit_text(name, limit["value"]),
        "limit": f"{side} {limit_text(name, limit['limit'])}",
        "passed": limit["passed"],
    }


def _kind_row(one: Kind) -> dict[str, Any]:
    """Return one row for all linear layers of a kind in a layer."""
    quantized = [linear for linear in one.linears if not linear.is_float]
    outputs, weights = one.errors(of_weights=False), one.errors(of_weights=True)
    cosines = known(linear.cosine for linear in quantized)
    return {
        "layer": one.layer,
        "kind": one.kind,
        "count": len(one.linears),
        "num_float": one.num_float,
        "scheme": quantized[0].scheme if quantized else "float",
        "median": outputs[len(outputs) // 2] if outputs else None,
        "most": outputs[-1] if outputs else None,
        "cosine": cosines[0] if cosines else None,
        "weights": weights[-1] if weights else None,
        "name": quantized[-1].name if quantized else one.linears[0].name,
    }


def _expert_rows(experts: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return what the experts of each layer have seen."""
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for one in experts:
        by_layer.setdefault(one["layer"], []).append(one)
    return [(layer, pictures.seen_text(members).replace("\n", "; ")) for layer, members in by_layer.items()]


def _facts(proof: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what was made of what: a name, words, and a digest."""
    calibration, evaluation = proof.get("calibration"), proof.get("evaluation")
    return [
        ("model", f"{proof['model']} ({proof['family']})", proof["source_model_sha256"]),
        ("calibration text", *_text(calibration, "none: rounded without text")),
        ("held-out text", *_text(evaluation, "none: not measured")),
        ("recipe", f"{METHODS.get(proof['method'], proof['method'])} {proof['scheme']}", proof["recipe_sha256"]),
    ]


def _text(text: Mapping[str, Any] | None, otherwise: str) -> tuple[str, str]:
    if not text:
        return otherwise, ""
    return f"{text['name']}, {text['windows']} windows of {text['window_tokens']} tokens", text["sha256"]
