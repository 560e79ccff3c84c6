"""The screen for quantized weights: what they are, what they lost, and what runs them."""

from __future__ import annotations

from typing import Any

from ferry.core.units import size_text
from ferry.core.verb import Result

NUM_SHOWN = 4


def quantized_report(result: Result) -> str:
    sizes, floats = result["sizes"], result["float_linears"]
    kept = f"{', '.join(floats[:NUM_SHOWN])}{' ...' if len(floats) > NUM_SHOWN else ''}"
    lines = [
        f"{result['path']}: {result['family']} ({result['architecture']}), quantized, {result['stored_as']}",
        "",
        *(f"scheme       {_scheme(scheme)}" for scheme in result["schemes"]),
        f"linears      {result['quantized_linears']} quantized, {len(floats)} float{f' ({kept})' if kept else ''}",
        f"size         {size_text(result['bytes'])}; the quantized weights {size_text(result['quantized_bytes'])}, "
        f"{result['bits_per_weight']:.3g} bits each with their scales",
        f"shape        {sizes['num_layers']} layers, hidden {sizes['hidden_size']}, vocabulary {sizes['vocab_size']}"
        f"{', tied' if sizes['tied'] else ''}",
        f"files        {len(result['weight_files'])} of weights, {result['num_tensors']} tensors, "
        f"{len(result['assets'])} other files",
    ]
    if result["manifest"]:
        lines.append(f"manifest     {result['manifest']['made_by']}, model sha256 {result['manifest']['model_sha256']}")
    if result["proof"]:
        lines.append(f"proof        {_proof(result['proof'])}")
    if result["missing"]:
        lines.append(f"missing      {', '.join(result['missing'])}")
    # Where a machine decides between lines of an engine, the one for this machine is marked.
    decided = {verdict["engine"] for verdict in result["engines"] if verdict["here"] is False}
    lines += ["", "engines", *(f"  {_engine(verdict, decided)}" for verdict in result["engines"])]
    if result["tensors"]:
        width = max(len(tensor["name"]) for tensor in result["tensors"])
        rows = result["tensors"]
        lines += [
            "",
            *(f"  {row['name']:<{width}}  {row['dtype']:<5} {row['shape']!s:<16} {row['file']}" for row in rows),
        ]
    return "\n".join(lines)


def _scheme(scheme: dict[str, Any]) -> str:
    activations = f", activations a scale for each {scheme['activations']}" if scheme["activations"] else ""
    zero = "" if scheme["symmetric"] else ", zero points"
    return f"{scheme['name']}: {scheme['bits']} bits, a scale for each {scheme['scale_for_each']}{zero}{activations}"


def _proof(proof: dict[str, Any]) -> str:
    parts = [f"KL {proof['kl']:.4g}"] if "kl" in proof else []
    parts += [f"top-1 {100 * proof['top1']:.1f} %"] if "top1" in proof else []
    if "perplexity" in proof and "perplexity_original" in proof:
        parts.append(f"perplexity {proof['perplexity']:.4g} (original {proof['perplexity_original']:.4g})")
    verdicts: dict[Any, str] = {True: ", within its limits", False: ", beyond its limits"}
    verdict = verdicts.get(proof.get("passed"), "")
    return f"{', '.join(parts)} on {proof.get('tokens', '?')} tokens{verdict}"


def _engine(verdict: dict[str, Any], decided: set[str]) -> str:
    word = {True: "runs", False: "does not run", None: "not known"}[verdict["runs"]]
    condition = f" ({verdict['condition']})" if verdict["condition"] else ""
    here = "  <- this machine" if verdict["engine"] in decided and verdict["here"] else ""
    note = f": {verdict['note']}" if verdict["note"] else ""
    return f"{verdict['engine']}{condition}: {word}{note}{here}"
