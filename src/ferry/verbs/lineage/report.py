"""A lineage as a tree: the artifact first, what it was made from below it."""

from __future__ import annotations

from typing import Any

from ferry.core.verb import Result

SHORT = 12


def report(result: Result) -> str:
    """Return one line per artifact; a mark tells which hold the same model as the first."""
    nodes = {node["id"]: node for node in result["nodes"]}
    same = nodes[result["id"]]["model_sha256"]
    lines = _tree(nodes, result["id"], same, "", "")
    return "\n".join([*lines, f"= the same model: sha256 {same}"] if same else lines)


def _tree(nodes: dict[str, dict[str, Any]], key: str, same: str, lead: str, below: str) -> list[str]:
    node = nodes.get(key)
    if node is None:
        return [f"{lead}{key[:SHORT]}  (unknown)"]
    mark = "=" if same and node["model_sha256"] == same else " "
    made = f"by {node['verb']}: {node['summary']}  ({node['created']})" if node["verb"] else node["summary"]
    lines = [f"{lead}{mark} {node['name']}  {node['kind']}  {key[:SHORT]}  {made}"]
    lines += [f"{below}   changed: {change}" for change in node["changes"]]
    for index, parent in enumerate(node["parents"]):
        last = index == len(node["parents"]) - 1
        lines += _tree(nodes, parent, same, below + "└─ ", below + "   ") if last else _tree(
            nodes, parent, same, below + "├─ ", below + "│  "
        )  # fmt: skip
    return lines
