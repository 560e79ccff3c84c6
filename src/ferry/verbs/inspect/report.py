"""What a model is, on one screen."""

from __future__ import annotations

from typing import Any

from ferry.core.units import size_text
from ferry.core.verb import Result
from ferry.verbs.inspect.quantized_report import quantized_report

NUM_CARRIED = 4


def report(result: Result) -> str:
    """Return the screen: identity, sizes, layout, what is legal, and the two tables."""
    if result["format"] == "adapter":
        return _adapter(result)
    if result["format"] == "quantized":
        return quantized_report(result)
    sizes = result["sizes"]
    heads = f"{sizes['num_heads']} heads, {sizes['num_groups']} kv heads of {sizes['head_dim']}"
    lines = [
        f"{result['path']}: {result['family']} ({result['architecture']}), {_layout(result)}",
        "",
        f"parameters   {count_text(result['parameters'])}{_active(result)}, {size_text(result['bytes'])}, "
        + ", ".join(f"{dtype} {100 * n / result['parameters']:.3g} %" for dtype, n in result["dtypes"].items()),
        f"shape        {sizes['num_layers']} layers, hidden {sizes['hidden_size']}, ffn {_ffn(sizes)}, {heads}, "
        f"vocabulary {sizes['vocab_size']}{', tied' if sizes['tied'] else ''}",
        f"files        {len(result['weight_files'])} of weights "
        f"({size_text(sum(file['bytes'] for file in result['weight_files']))}), {result['num_tensors']} tensors, "
        f"{len(result['assets'])} other files",
        f"legal        tp {_numbers(result['legal_tp'])}; pp {_numbers(result['legal_pp'])}"
        + (f"; ep {_numbers(result['legal_ep'])}" if sizes["num_experts"] else ""),
    ]
    if result["manifest"]:
        lines.append(f"manifest     {result['manifest']['made_by']}, model sha256 {result['manifest']['model_sha256']}")
    if result["missing"]:
        lines.append(f"missing      {', '.join(result['missing'])}")
    if result["carried"]:
        names = result["carried"]
        lines.append(
            f"carried      {', '.join(names[:NUM_CARRIED])}{f' ... ({len(names)})' if len(names) > NUM_CARRIED else ''}"
        )
    lines += ["", *_groups(result), "", *_tokens(result)]
    if result["tensors"]:
        lines += ["", *_tensors(result["tensors"])]
    return "\n".join(lines)


def _adapter(result: Result) -> str:
    targets = result["targets"] if isinstance(result["targets"], str) else ", ".join(result["targets"])
    lines = [
        f"{result['path']}: LoRA adapter of {result['base']}",
        "",
        f"parameters   {count_text(result['parameters'])}, rank {result['rank']}, alpha {result['alpha']:g}",
        f"modules      {result['num_modules']}: {targets}",
    ]
    if result["base_model_sha256"]:
        lines.append(f"base         model sha256 {result['base_model_sha256']}")
    if result["manifest"]:
        lines.append(f"manifest     {result['manifest']['made_by']}, sha256 {result['manifest']['model_sha256']}")
    return "\n".join(lines)


def count_text(count: float) -> str:
    """Return a count with a unit: 134.5 M, 8.03 B, 2.69 T."""
    for unit, scale in ((" T", 1e12), (" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g}{unit}"
    return f"{count:.4g}"


def _active(result: Result) -> str:
    active = result["active_parameters"]
    return f" ({count_text(active)} active)" if active != result["parameters"] else ""


def _ffn(sizes: dict[str, Any]) -> str:
    if not sizes["num_experts"]:
        return str(sizes["ffn_hidden_size"])
    return f"{sizes['num_experts']} experts of {sizes['expert_ffn_hidden_size']}, {sizes['experts_per_token']} used"


def _layout(result: Result) -> str:
    layout = result["layout"]
    if result["format"] == "hf":
        return "Hugging Face"
    if result["format"] == "gguf":
        return str(layout["source"])
    parts = [f"{axis.upper()}{layout[axis]}" for axis in ("tp", "pp", "vpp", "ep") if layout.get(axis, 1) > 1]
    where = " x ".join(parts) or "TP1"
    kind = {"megatron": "torch"}.get(result["format"], result["format"])
    return f"Megatron {kind}, {where}, names {layout.get('names', 'mcore')}, {layout.get('iteration', '')}"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _groups(result: Result) -> list[str]:
    rows = result["parameters_by_group"].items()
    return ["parameters by group"] + [
        f"  {group:<12}{count_text(count):>10}  {100 * count / result['parameters']:5.1f} %" for group, count in rows
    ]


def _tokens(result: Result) -> list[str]:
    head = "tokens per parameter: training tokens and compute (6 x active parameters x tokens)"
    return [head] + [
        f"  {row['ratio']:>5}  {count_text(row['tokens']):>9} tokens  {row['training_flop']:.2e} FLOP"
        + ("   compute-optimal" if row["ratio"] == 20 else "")
        for row in result["tokens_per_parameter"]
    ]


def _tensors(tensors: list[dict[str, Any]]) -> list[str]:
    width = max(len(tensor["name"]) for tensor in tensors)
    return [
        f"  {tensor['name']:<{width}}  {tensor['dtype']:<5} {tensor['shape']!s:<16} {tensor.get('file', '')}"
        for tensor in tensors
    ]
