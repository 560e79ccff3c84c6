"""One verb, from the words after it to an exit status: resolve, plan, open a record, run, report.

Exit status: 0 done, 1 a defect of Ferry, 2 to 8 as in `ferry.core.errors`, 128 + n stopped by signal n (130 = Ctrl-C).
With `--json` stdout holds exactly one JSON document, whatever happens and whatever a library prints.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any

from ferry.core.config import VerbConfig
from ferry.core.errors import ConfigError, FerryError, did_you_mean
from ferry.core.record import Record, error_json, open_record
from ferry.core.resolution import Command, understand
from ferry.core.verb import Result, Verb, discover, load, load_plan, load_run
from ferry.terminal import TerminalReporter, error_text, plan_text

EXIT_INTERNAL = 1


class Stopped(BaseException):
    """A signal asked the process to end. Not an Exception: only cleaning up may see it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


def execute(name: str, words: Sequence[str], verbs: Mapping[str, Verb] | None = None) -> int:
    """Run one verb (of `verbs`; by default of all there are) and return the exit status; every error is one line."""
    own_words = words[: words.index("--")] if "--" in words else words
    as_json = "--json" in own_words
    try:
        with _signals():
            verb = _find(name, discover() if verbs is None else verbs)
            if "--help" in own_words or "-h" in own_words:
                from ferry.help import verb_help

                _print(verb_help(verb))
                return 0
            return _execute(understand(verb, words, os.environ), as_json)
    except FerryError as error:
        return _fail(error_json(error), as_json)
    except Stopped as stop:
        return _fail(_stopped(stop), as_json)
    except BrokenPipeError:
        # The reader (`| head`) has gone. Without this, Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001 - the border of the program: a defect becomes one line and a traceback
        return _fail(_defect(name, error), as_json)


def _execute(command: Command, as_json: bool) -> int:
    verb, config = command.verb, command.resolved.config
    dry_run = "dry_run" in command.arguments.switches
    if dry_run and not verb.plan:
        raise ConfigError(f"ferry {verb.name} has no --dry-run: it writes nothing", code="config.no-plan")
    with _stdout_kept_clean(as_json):
        plan = load_plan(verb)(config) if verb.plan else None
    if dry_run and plan is not None:
        _print(_document({"dry_run": True, "plan": plan.to_json()}) if as_json else plan_text(plan))
        return 0
    record = None
    if plan is not None:
        values = config.model_dump(mode="json")
        record = open_record(verb.name, values, command.resolved.origins, plan.to_json(), _warn)
    quiet = as_json or "quiet" in command.arguments.switches
    reporter = TerminalReporter(sys.stderr, record, quiet=quiet)
    with _stdout_kept_clean(as_json):
        result = _run(verb, config, reporter, record)
    if as_json:
        _print(_document({**result, **({"record": record.id} if record else {})}))
    else:
        _print(load(verb.report)(result))
    return int(load(verb.exit_status)(result)) if verb.exit_status else 0


def _run(verb: Verb, config: VerbConfig, reporter: TerminalReporter, record: Record | None) -> Result:
    """Run a verb so that its record is closed however it ends."""
    try:
        result = load_run(verb)(config, reporter)
    except BaseException as error:
        reporter.clear()
        if record is not None:
            record.close("interrupted" if isinstance(error, Stopped) else "failed", error=error)
            error.__dict__["ferry_record"] = record.path
        raise
    reporter.clear()
    if record is not None:
        record.close("ok", result=result)
    return result


def _find(name: str, verbs: Mapping[str, Verb]) -> Verb:
    if name in verbs:
        return verbs[name]
    near = did_you_mean(name, [*verbs, "--help", "--version"])
    if name.startswith("-"):
        raise ConfigError(
            f"unknown flag {name!r} before the verb{near}",
            code="cli.unknown-flag",
            repair="flags of a verb follow it: `ferry VERB --flag`",
        )
    raise ConfigError(f"unknown verb {name!r}{near}", code="cli.unknown-verb", repair="see `ferry --help`")


def _stopped(stop: Stopped) -> dict[str, Any]:
    """Return the error document of a run that a signal ended."""
    is_kept = "ferry_kept" in stop.__dict__
    kept, repair = ("what is done is kept", "run the same command again to go on") if is_kept else ("", "")
    message = f"stopped by {stop}; {kept or 'nothing half-made was kept'}"
    return {"code": "stopped", "message": message, "repair": repair, "exit_status": stop.exit_status}


def _defect(name: str, error: Exception) -> dict[str, Any]:
    """Return a defect of Ferry as an error document; its traceback is kept in a run record, made now if need be."""
    path = getattr(error, "ferry_record", None)
    if path is None:
        record = open_record(name, {}, {}, None, _warn)
        if record is not None:
            record.close("failed", error=error)
            path = record.path
    if path is None:
        import traceback

        traceback.print_exception(error)
    kept = f"the traceback is in {path}/result.json" if path else "the traceback is above"
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {
        "code": "internal",
        "message": message,
        "repair": f"this is a defect of Ferry; {kept}",
        "exit_status": EXIT_INTERNAL,
    }


def _fail(error: dict[str, Any], as_json: bool) -> int:
    if as_json:
        _print(_document({"error": error}))
    else:
        sys.stdout.flush()
        sys.stderr.write(error_text(error["message"], error["repair"], error["code"], sys.stderr))
    return int(error["exit_status"])


def _document(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that end a process into `Stopped`, so that locks, temporary files and records are closed."""

    def stop(signum: int, frame: FrameType | None) -> None:
        # A second signal while cleaning up ends the process at once.
        signal.signal(signum, signal.SIG_DFL)
        raise Stopped(signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup and background jobs stay protected
                before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _stdout_kept_clean(wanted: bool) -> Iterator[None]:
    """Send to stderr what libraries and child processes write to stdout, so that `--json` prints one document only."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept_fd, 1)
        os.close(kept_fd)
