"""Run records read back: which runs there are, how each ended, and one run found by the start of its id."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.errors import InputError, did_you_mean
from ferry.core.record import home


class Run(NamedTuple):
    """One record. `status` is ok, failed, interrupted, running or killed."""

    id: str
    path: Path
    verb: str
    status: str
    started_s: float
    config: dict[str, Any]
    """config.json: `config`, `origins`, `argv`, `directory`."""
    outcome: dict[str, Any]
    """result.json, or nothing while the run goes on or after it was killed."""


def all_runs() -> list[Run]:
    """Return every run, the newest first."""
    folder = home() / "runs"
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    runs = [_read(path) for path in paths]
    return sorted(runs, key=lambda run: (run.started_s, run.id), reverse=True)


def find_run(wanted: str) -> Run:
    """Return the run with this id, the one whose id starts with it or ends with `-<it>`, or the `latest`."""
    runs = all_runs()
    if wanted == "latest" and runs:
        return runs[0]
    exact = [run for run in runs if run.id == wanted]
    found = exact or [run for run in runs if wanted and (run.id.startswith(wanted) or run.id.endswith(f"-{wanted}"))]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(run.id for run in found[:5])
        raise InputError(
            f"{wanted!r} means {len(found)} runs: {names}{', ..' if len(found) > 5 else ''}",
            code="runs.ambiguous",
            repair="give more of the id",
        )
    near = did_you_mean(wanted, [run.id for run in runs])
    raise InputError(f"no run {wanted!r} in {home() / 'runs'}{near}", code="runs.unknown", repair="see `ferry runs`")


def read_events(run: Run) -> list[dict[str, Any]]:
    """Return a run's events; a last line torn by a crash is left out."""
    path = run.path / "events.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            events.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # no newline after it: it was being written
                break
            raise InputError(f"{path}, line {number} is not JSON", code="runs.damaged") from None
    return events


def read_document(run: Run, name: str) -> dict[str, Any]:
    """Return one JSON file of a record, or nothing if it is not there."""
    return _json(run.path / name)


def _read(path: Path) -> Run:
    config, outcome = _json(path / "config.json"), _json(path / "result.json")
    status = outcome.get("status") or ("running" if _is_locked(path / "lock") else "killed")
    if status == "killed":
        # It may have ended between the two looks.
        outcome = _json(path / "result.json")
        status = outcome.get("status", status)
    return Run(path.name, path, config.get("verb", "?"), status, config.get("started", 0.0), config, outcome)


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _json(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise InputError(f"{path} is not JSON", code="runs.damaged", repair="remove this record") from None
    return document
