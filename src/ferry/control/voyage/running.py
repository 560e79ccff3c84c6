"""One step, run: a verb in this process under a record of its own, or a command as a child process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ferry.control.voyage.measuring import Cost
from ferry.control.voyage.preparing import Prepared
from ferry.core.errors import GateError, UnavailableError
from ferry.core.progress import Reporter
from ferry.core.record import Record, open_record
from ferry.core.verb import Result, discover, load, load_run

TAIL_CHARACTERS = 2000


class StepReporter(Reporter):
    """Passes progress on to the voyage's reporter, and writes events to the step's own record."""

    def __init__(self, outer: Reporter, record: Record | None) -> None:
        self._outer = outer
        self._record = record

    def event(self, name: str, /, **fields: Any) -> None:
        if self._record is not None:
            self._record.event(name, **fields)

    def start(self, label: str, total: int, unit: str = "bytes", done: int = 0) -> None:
        self._outer.start(label, total, unit, done)

    def advance(self, amount: int) -> None:
        self._outer.advance(amount)

    def status(self, text: str, curve: Sequence[float] = ()) -> None:
        self._outer.status(text, curve)

    def finish(self) -> None:
        self._outer.finish()

    def say(self, text: str) -> None:
        self._outer.say(text)


class Ran(NamedTuple):
    """What a step said, and of a verb the id of its record ("" where none could be kept) and its exit status."""

    result: Result
    record: str = ""
    status: int = 0


def run_verb(prepared: Prepared, origin: str, reporter: Reporter) -> Ran:
    """Run a verb. A status other than 0 is its verdict on what it made or looked at: the result tells why."""
    verb = discover()[prepared.step.verb]
    assert prepared.config is not None
    origins = dict.fromkeys(prepared.told, origin)
    plan = prepared.plan.to_json() if prepared.plan else None
    record = open_record(verb.name, prepared.told, origins, plan, reporter.say) if plan else None
    try:
        result = load_run(verb)(prepared.config, StepReporter(reporter, record))
    except BaseException as error:
        if record is not None:
            record.close("failed" if isinstance(error, Exception) else "interrupted", error=error)
        raise
    if record is not None:
        record.close("ok", result=result)
    status = int(load(verb.exit_status)(result)) if verb.exit_status else 0
    return Ran(result, record.id if record else "", status)


def run_command(prepared: Prepared, folder: Path, log: Path, cost: Cost) -> Ran:
    """Run a command in the voyage file's folder; its stderr goes to a log, its stdout is the result."""
    words, env = prepared.told["command"], {**os.environ, **prepared.told["env"]}
    try:
        with open(log, "wb") as errors:
            child = subprocess.Popen(
                words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        text = f"cannot start {words[0]}: {error.strerror}"
        raise UnavailableError(text, code="run.no-program", repair="install it, or give its path") from None
    stdout, status = _wait(child, cost)
    if status:
        ending = f"was stopped by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise GateError(f"{Path(words[0]).name} {ending}{_last_line(log)}", code="run.command", repair=f"see {log}")
    return Ran(read_result(stdout.decode(errors="replace")))


def _wait(child: subprocess.Popen[bytes], cost: Cost) -> tuple[bytes, int]:
    """Read a child's output to its end; if this process is stopped meanwhile, so is the child with all it started."""
    assert child.stdout is not None
    try:
        with child.stdout as pipe:
            stdout = pipe.read()
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        _guarded(lambda: os.killpg(child.pid, signal.SIGKILL))
        child.wait()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    cost.peak_rss_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stdout, child.returncode


def _guarded(act: Callable[[], None]) -> None:
    try:
        act()
    except ProcessLookupError:
        return  # it has ended by itself


def read_result(stdout: str) -> Result:
    """Return what a command said: its whole output or its last line as a JSON object, else the end of its text."""
    lines = stdout.strip().splitlines()
    for text in (stdout, lines[-1] if lines else ""):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        return value if isinstance(value, dict) else {"value": value}
    return {"text": stdout.strip()[-TAIL_CHARACTERS:]} if lines else {}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""
