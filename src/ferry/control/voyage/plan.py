"""What a voyage would do: the file checked whole, each step planned as far as it can be known already."""

from __future__ import annotations

import hashlib
from typing import Any

from ferry.control.voyage.config import RunConfig
from ferry.control.voyage.journey import tasks
from ferry.control.voyage.preparing import prepare, steps_needed
from ferry.control.voyage.reading import read_voyage
from ferry.control.voyage.state import State
from ferry.control.voyage.voyage import Step, Voyage
from ferry.core.errors import FerryError
from ferry.core.plan import Plan


def plan(config: RunConfig) -> Plan:
    """Return the steps with what each would do; refuse a file that is wrong, and a first step that is impossible."""
    voyage = read_voyage(config)
    state = State(voyage)
    state.check()
    names = voyage.names()
    outlooks = []
    is_settled = True  # no step so far will be made, so what the next one reads is there as it will be
    for step, task in tasks(voyage, config):
        outlook = _outlook(voyage, step, task, names, state, is_settled=is_settled)
        is_settled = is_settled and outlook["state"] != "make"
        outlooks.append(outlook)
    return Plan(
        verb="run",
        summary=f"{voyage.name}: {len(voyage.steps)} steps, {len(voyage.gates)} gates, "
        f"{sum(outlook['state'] == 'skip' for outlook in outlooks)} finished already",
        inputs={"voyage": hashlib.sha256(voyage.file.read_bytes()).hexdigest()},
        output=str(voyage.output),
        read_bytes=sum(outlook["plan"]["read_bytes"] for outlook in outlooks if outlook["plan"]),
        write_bytes=sum(outlook["plan"]["write_bytes"] for outlook in outlooks if outlook["plan"]),
        memory_bytes=max((outlook["plan"]["memory_bytes"] for outlook in outlooks if outlook["plan"]), default=0),
        choices=tuple(f"{outlook['step']:14}  {outlook['text']}" for outlook in outlooks),
        details={"steps": outlooks, "gates": [gate.text for gate in voyage.gates], "variables": voyage.variables},
    )


def _outlook(
    voyage: Voyage, step: Step, task: str, names: dict[str, Any], state: State, *, is_settled: bool
) -> dict[str, Any]:
    """Return what will become of one step, as JSON values; enter its earlier result among the names if it stays."""
    entry = state.finished(step.name)
    if task == "take":
        if entry is not None:
            names["steps"][step.name] = entry["result"]
        return _described(step, "skip" if entry else "wait", "taken as it is" if entry else "not made: not asked for")
    if any(name not in names["steps"] for name in steps_needed(step)):
        return _described(step, "make", f"{step.kind}: planned when {', '.join(steps_needed(step))} is done")
    try:
        prepared = prepare(voyage, step, names, state)
    except FerryError as error:
        if is_settled:
            raise
        return _described(step, "make", f"{step.kind}: cannot be planned yet ({error.message})")
    if task == "make" and entry and entry["identity"] == prepared.identity and state.is_intact(entry):
        names["steps"][step.name] = entry["result"]
        return _described(step, "skip", "skipped: finished before, nothing has changed since")
    told = prepared.plan.summary if prepared.plan else " ".join(map(str, prepared.told.get("command", [step.kind])))
    outlook = _described(step, "make", f"{step.kind}: {told}")
    outlook["plan"] = prepared.plan.to_json() if prepared.plan else None
    return outlook


def _described(step: Step, state: str, text: str) -> dict[str, Any]:
    return {"step": step.name, "verb": step.kind, "state": state, "text": text, "plan": None}
