"""`ferry run`: read the voyage, make its steps, judge its gates, and leave a report, also of a voyage that failed."""

from __future__ import annotations

from typing import Any

from ferry.control.voyage.config import RunConfig
from ferry.control.voyage.journey import Journey, tasks
from ferry.control.voyage.page import render
from ferry.control.voyage.reading import read_voyage
from ferry.control.voyage.state import REPORT_NAME, State
from ferry.control.voyage.verdict import verdict_of
from ferry.core.errors import GateError
from ferry.core.progress import Reporter
from ferry.core.staging import write_file
from ferry.core.verb import Result


def run(config: RunConfig, reporter: Reporter) -> Result:
    """Make the voyage and return its steps, gates and verdict."""
    voyage = read_voyage(config)
    planned = tasks(voyage, config)
    state = State(voyage)
    with state.locked():
        journey = Journey(voyage, state, reporter)
        try:
            for step, task in planned:
                if task == "take":
                    journey.take(step)
                else:
                    journey.make(step, again=task == "make again")
                journey.judge_after(step)
        except Exception as error:
            _leave_report(journey, error)
            raise
        return {**_result(journey), "report": _leave_report(journey, None)}


def _leave_report(journey: Journey, error: Exception | None) -> str:
    """Write the page and return its path."""
    path = journey.voyage.output / REPORT_NAME
    write_file(path, render(journey, error).encode())
    if isinstance(error, GateError):
        error.repair = f"{error.repair}; see {path}" if error.repair else f"see {path}"
    return str(path)


def _result(journey: Journey) -> dict[str, Any]:
    entries = list(journey.entries.values())
    made = [entry for entry in entries if entry["status"] == "done"]
    return {
        "voyage": journey.voyage.name,
        "output": str(journey.voyage.output),
        "verdict": verdict_of(journey, None).text,
        "steps": [{key: value for key, value in entry.items() if key not in ("told", "made")} for entry in entries],
        "waiting": [step.name for step in journey.voyage.steps if step.name not in journey.entries],
        "gates": journey.gates,
        "seconds": round(sum(entry["seconds"] for entry in made), 3),
        "peak_rss_bytes": max((entry["peak_rss_bytes"] for entry in entries), default=0),
    }
