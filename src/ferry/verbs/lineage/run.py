"""`ferry lineage`: the manifest carries every ancestor, so nothing else needs to exist any more."""

from __future__ import annotations

from dataclasses import asdict

from ferry.core.manifest import read_manifest
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.verbs.lineage.config import LineageConfig


def run(config: LineageConfig, reporter: Reporter) -> Result:
    """Return the graph: nodes by id, each with its parents; the first is the artifact itself."""
    manifest = read_manifest(config.path)
    nodes = {node.id: asdict(node) for node in reversed(manifest.ancestry())}
    return {"path": str(config.path), "id": manifest.id, "nodes": list(reversed(nodes.values()))}
