"""A voyage under way: each step is skipped, taken as it is, or made; then the gates behind it are judged."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ferry.control.voyage.config import RunConfig
from ferry.control.voyage.expression import judge
from ferry.control.voyage.measuring import Cost, measured
from ferry.control.voyage.preparing import Prepared, at_step, prepare
from ferry.control.voyage.references import find
from ferry.control.voyage.running import Ran, run_command, run_verb
from ferry.control.voyage.state import State
from ferry.control.voyage.voyage import Gate, Step, Voyage
from ferry.core.errors import ConfigError, FerryError, GateError, did_you_mean
from ferry.core.progress import Reporter
from ferry.core.verb import Result


class Journey:
    """What is done so far. `entries` holds one JSON object a step, `gates` one a judged gate."""

    def __init__(self, voyage: Voyage, state: State, reporter: Reporter) -> None:
        self.voyage = voyage
        self.state = state
        self.reporter = reporter
        self.names = voyage.names()
        self.entries: dict[str, dict[str, Any]] = {}
        self.gates: list[dict[str, Any]] = []

    def take(self, step: Step) -> None:
        """Take a step's earlier result as it is, if there is one."""
        entry = self.state.finished(step.name)
        if entry is not None:
            self._enter(step, {**entry, "status": "kept"})

    def make(self, step: Step, *, again: bool = False) -> None:
        """Make a step, unless it was finished before and nothing has changed since."""
        prepared = prepare(self.voyage, step, self.names, self.state, again=again)
        entry = self.state.finished(step.name)
        if entry and not again and entry["identity"] == prepared.identity and self.state.is_intact(entry):
            self._enter(step, {**entry, "status": "skipped"})
            self._say(step, "skipped: finished before, nothing has changed since")
            return
        self._say(step, step.kind)
        cost = Cost()
        try:
            with measured() as cost:
                own, ran = self._run(prepared, cost)
        except BaseException as error:
            self.entries[step.name] = self._entry(prepared, cost, "failed", {}, "")
            if isinstance(error, FerryError):
                raise at_step(error, step) from error
            raise
        if not step.verb:
            # A command is told where to write, too: what it wrote is what must still be there to skip it.
            prepared = prepare(self.voyage, step, self.names, self.state)
        result, record, status = ran
        entry = self._entry(prepared, cost, "failed" if status else "done", result, record)
        if isinstance(result.get("artifact"), str):
            entry["artifact"] = self.state.describe(Path(result["artifact"]))
            entry["made"] = entry["artifact"] if own else None
        if status:
            # Not finished, so that it is made again next time; but the report shows what it found.
            self.entries[step.name] = entry
            raise GateError(
                f"step {step.name!r}: ferry {step.verb} ended with the verdict {status}",
                code="run.verdict",
                repair="its numbers are in the report",
            )
        self.state.finish(step.name, entry)
        self._enter(step, entry)
        self.reporter.event("step", name=step.name, record=record, seconds=cost.seconds)

    def judge_after(self, step: Step) -> None:
        """Judge the gates behind a step; raise GateError at the first that does not hold."""
        for gate in self.voyage.gates:
            if gate.after == step.name and step.name in self.entries:
                self._judge(gate)

    def _run(self, prepared: Prepared, cost: Cost) -> tuple[bool, Ran]:
        """Return whether the voyage made the target, and what the step said."""
        step, voyage = prepared.step, self.voyage
        if not step.verb:
            log = self.state.folder / "logs" / f"{step.name}.log"
            ran = run_command(prepared, voyage.file.parent, log, cost)
            base: Path = voyage.file.parent
            own = False
        else:
            output = prepared.plan.output if prepared.plan else ""
            own = bool(output) and self.state.claim(step.name, step.verb, Path(output))
            ran = run_verb(prepared, f"{voyage.file.name}, step {step.name}", self.reporter)
            base = Path.cwd()
        if isinstance(ran.result.get("artifact"), str):
            # Later steps may run in another directory.
            ran = ran._replace(result={**ran.result, "artifact": os.path.abspath(base / ran.result["artifact"])})
        return own, ran

    def _entry(self, prepared: Prepared, cost: Cost, status: str, result: Result, record: str) -> dict[str, Any]:
        size = result.get("bytes")
        return {
            "name": prepared.step.name,
            "kind": prepared.step.kind,
            "status": status,
            "identity": prepared.identity,
            "seconds": cost.seconds,
            "cpu_s": cost.cpu_s,
            "peak_rss_bytes": cost.peak_rss_bytes,
            "bytes": size if isinstance(size, int) else None,
            "record": record,
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "told": prepared.told,
            "result": result,
        }

    def _enter(self, step: Step, entry: dict[str, Any]) -> None:
        self.entries[step.name] = entry
        self.names["steps"][step.name] = entry["result"]

    def _judge(self, gate: Gate) -> None:
        try:
            judgement = judge(gate.tree, lambda name: find(self.names, name))
        except ConfigError as error:
            raise ConfigError(f"gate {gate.text!r}: {error.message}", code=error.code) from None
        self.gates.append({"gate": gate.text, "after": gate.after, **judgement._asdict()})
        self.reporter.event("gate", **self.gates[-1])
        if not judgement.holds:
            values = ", ".join(f"{name} is {_short(value)}" for name, value in judgement.values.items())
            text = f"gate {gate.text!r} after step {gate.after!r} does not hold: {values}"
            raise GateError(text, code="run.gate", repair="the voyage stopped here; the steps before it are kept")

    def _say(self, step: Step, text: str) -> None:
        number = 1 + [other.name for other in self.voyage.steps].index(step.name)
        self.reporter.say(f"[{number}/{len(self.voyage.steps)}] {step.name}: {text}")


def tasks(voyage: Voyage, config: RunConfig) -> list[tuple[Step, str]]:
    """Return what to do with each step: `make`, `make again`, or `take` its earlier result."""
    names = [step.name for step in voyage.steps]
    for flag, name in (("--only", config.only), ("--from", config.from_step)):
        if name and name not in names:
            text = f"{flag} {name}: {voyage.file.name} has no such step{did_you_mean(name, names)}"
            raise ConfigError(text, code="run.unknown-step", repair=f"it has {', '.join(names)}")
    if config.only and config.from_step:
        raise ConfigError("--only and --from cannot be given together", code="config.conflict")
    if config.only:
        return [(step, "make again" if step.name == config.only else "take") for step in voyage.steps]
    if config.from_step:
        first = names.index(config.from_step)
        return [(step, "take" if index < first else "make again") for index, step in enumerate(voyage.steps)]
    return [(step, "make") for step in voyage.steps]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
