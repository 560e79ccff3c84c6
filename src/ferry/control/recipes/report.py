"""Recipes and proposals as a screen for people."""

from __future__ import annotations

from typing import Any

from ferry.core.units import size_text
from ferry.core.verb import Result

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits")


def report(result: Result) -> str:
    """Return the page for what was asked."""
    pages = {"list": _list, "show": _show, "propose": _propose}
    return pages[result["action"]](result)


def _list(result: Result) -> str:
    if not result["recipes"]:
        return "no recipes"
    width = max(len(row["id"]) for row in result["recipes"])
    lines = [f"{'recipe':{width}}  tp  pp  dp  mbs  devices"]
    notes: dict[str, list[str]] = {}
    for row in result["recipes"]:
        marks = [problem for problem in row["problems"] if problem["kind"] != "positions"]
        dp = row["dp"] or "-"
        cells = f"{row['tp']:>2}  {row['pp']:>2}  {dp:>2}  {row['micro_batch']:>3}  {_devices(row):>7}"
        flags = ["!"] if marks else []
        flags += ["long"] if len(marks) < len(row["problems"]) else []
        lines.append(f"{row['id']:{width}}  {cells}  {' '.join(flags)}".rstrip())
        for problem in row["problems"]:
            notes.setdefault(problem["kind"], []).append(f"{row['id']}: {problem['text']}; {problem['proposal']}")
    fitting = [line for kind, texts in notes.items() if kind != "positions" for line in texts]
    if fitting:
        lines += ["", "! does not fit together, or is blank in the manual", *(f"  {line}" for line in fitting)]
    if "positions" in notes:
        lines += ["", "long: longer than the model was made for; `ferry recipes show ID` says more"]
    return "\n".join(lines)


def _show(result: Result) -> str:
    row = result["recipe"]
    lines = [
        f"{row['id']}",
        f"  manual       tp={row['tp']} pp={row['pp']} micro_batch={row['micro_batch']}, devices {_devices(row)}",
        f"  mesh         {_mesh(result['mesh'])} on {result['devices']} devices",
        *_facts(result),
        "",
        f"  memory of the fullest rank, {result['dtype']}, an estimate",
    ]
    titles = {"plain": "without checkpointing", "checkpointed": "with activation checkpointing"}
    lines += [f"    {titles[name]:29}  {_parts(memory)}" for name, memory in result["memory_per_rank"].items()]
    if row["problems"]:
        lines += ["", "  problems"]
        lines += [f"    {problem['text']}; {problem['proposal']}" for problem in row["problems"]]
    return "\n".join(lines)


def _propose(result: Result) -> str:
    checkpointing = "on" if result["checkpointing"] else "off"
    lines = [
        f"{result['model']}, {result['method']}, {result['devices']} devices of "
        f"{size_text(result['device_memory_bytes'])}",
        f"  mesh         {_mesh(result['mesh'])}, micro_batch={result['micro_batch']}, checkpointing {checkpointing}",
        *_facts(result),
        f"  memory       {_parts(result['memory_per_rank'])}",
        "",
        "  why",
    ]
    return "\n".join([*lines, *(f"    {reason}" for reason in result["reasons"])])


def _facts(result: Result) -> list[str]:
    batch = result["global_batch"]
    bubble = f"; {batch['at_least']} or more keep the pipeline's bubble below 20 %" if result["mesh"]["pp"] > 1 else ""
    return [
        f"  global batch a multiple of {batch['multiple_of']} sequences of {result['seq_len']} tokens{bubble}",
        f"  model        {result['parameters'] / 1e9:.4g} B parameters, {result['flops_per_token'] / 1e9:.4g} "
        f"GFLOP a token, at most {result['max_positions'] or 'any number of'} positions",
        f"  throughput   {result['throughput']}",
    ]


def _parts(memory: dict[str, int]) -> str:
    parts = ", ".join(f"{part} {size_text(memory[f'{part}_bytes'])}" for part in PARTS)
    return f"{size_text(memory['total_bytes'])}: {parts}"


def _mesh(mesh: dict[str, int]) -> str:
    return f"tp={mesh['tp']} pp={mesh['pp']} dp={mesh['dp']}"


def _devices(row: dict[str, Any]) -> str:
    return f"{row['nodes']} x {row['devices_per_node']}" if row["devices"] else "blank"
