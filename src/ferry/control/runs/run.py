"""Reads run records and training runs; writes nothing but the page that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ferry.control.runs.config import RunsConfig
from ferry.control.runs.curves import compare_curves, curves_of, find, write_page
from ferry.core.progress import Reporter
from ferry.core.runs import Run, all_runs, read_document, read_events
from ferry.core.verb import Result

TIMINGS = ("wall_s", "user_cpu_s", "system_cpu_s", "peak_rss_bytes")


def run(config: RunsConfig, reporter: Reporter) -> Result:
    """Do what `config.action` says."""
    if config.action == "list":
        return {"action": "list", "runs": _list(config)}
    runs = [find(wanted) for wanted in config.ids]
    if config.page is not None:
        write_page(runs, config.page)
    found = _show(runs[0]) if config.action == "show" else compare(*runs)
    return {"action": config.action, **found, **({"page": str(config.page)} if config.page else {})}


def compare(first: Run, second: Run) -> Result:
    """Return what differs between two runs, part by part: rows of (name, value in the first, value in the second).

    Two training runs have `curves` too: their numbers side by side.
    """
    parts = {
        "config": (first.config.get("config", {}), second.config.get("config", {})),
        "environment": (read_document(first, "environment.json"), read_document(second, "environment.json")),
        "timings": (_timings(first), _timings(second)),
        "result": (first.outcome.get("result", {}), second.outcome.get("result", {})),
        "error": (_error(first), _error(second)),
    }
    heads = [{"id": run.id, "verb": run.verb, "status": run.status} for run in (first, second)]
    curves = curves_of([first, second])
    return {
        "runs": heads,
        "differences": {part: _differences(*pair) for part, pair in parts.items()},
        **({"curves": compare_curves(*curves)} if len(curves) == len(heads) else {}),
    }


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted names; anything else stays whole."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _list(config: RunsConfig) -> list[dict[str, Any]]:
    chosen = [run for run in all_runs() if config.verb in ("", run.verb) and config.status in ("", run.status)]
    return [_row(run) for run in chosen[: config.limit]]


def _row(run: Run) -> dict[str, Any]:
    row = {"id": run.id, "verb": run.verb, "status": run.status, "started": run.started_s, **_timings(run)}
    artifact = run.outcome.get("result", {}).get("artifact")
    return {**row, "artifact": artifact, "error": _error(run).get("message")}


def _show(run: Run) -> dict[str, Any]:
    return {
        **_row(run),
        "path": str(run.path),
        "directory": run.config.get("directory", ""),
        "config": run.config.get("config", {}),
        "origins": run.config.get("origins", {}),
        "environment": read_document(run, "environment.json"),
        "events": read_events(run),
        "result": run.outcome.get("result"),
        "failure": run.outcome.get("error"),
    }


def _timings(run: Run) -> dict[str, Any]:
    return {name: run.outcome.get(name) for name in TIMINGS}


def _error(run: Run) -> dict[str, Any]:
    error = run.outcome.get("error") or {}
    return {name: error[name] for name in ("code", "message") if name in error}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[list[Any]]:
    left, right = flatten(first), flatten(second)
    names = [*left, *(name for name in right if name not in left)]
    return [[name, left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)]
