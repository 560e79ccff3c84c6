"""Run records: one directory per run, written while the run goes on, so that even a killed run leaves its story.

    $FERRY_HOME/runs/<YYYYmmdd-HHMMSS>-<verb>-<6 hex>/
      lock              held (flock) by the process while it lives
      config.json       verb, resolved values, the origin of each
      plan.json         what the run set out to do
      environment.json  machine and versions
      events.jsonl      one JSON object a line, appended
      result.json       written last, whole: status, timings, result or error

A run without result.json whose lock is free was killed. The directory appears whole, under its lock. A home that cannot
be written never stops a verb.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ferry.core.environment import environment
from ferry.core.errors import FerryError
from ferry.core.staging import write_file

SYNC_INTERVAL_S = 1.0


def home() -> Path:
    """Return the directory where Ferry keeps its records."""
    return Path(os.environ.get("FERRY_HOME") or os.path.expanduser("~/.ferry"))


class Record:
    """The open record of the run that is going on. Every method may be called from several threads."""

    def __init__(self, path: Path, lock_fd: int, warn: Callable[[str], None]) -> None:
        self.path = path
        self.id = path.name
        self._warn = warn
        self._broken = False
        self._lock_fd = lock_fd
        self._events_fd = os.open(path / "events.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        self._synced_s = 0.0
        self._started_s = time.monotonic()
        self._cpu_s = _cpu_seconds()

    def event(self, name: str, /, **fields: Any) -> None:
        """Append one event. It survives a kill at once, and a power cut after a second."""
        self._guarded(lambda: self._append({"ts": round(time.time(), 3), **fields, "event": name}))

    def close(
        self, status: str, *, result: Mapping[str, Any] | None = None, error: BaseException | None = None
    ) -> None:
        """Write result.json, after which the record never changes. `status` is ok, failed or interrupted."""
        user_s, system_s = (now - then for now, then in zip(_cpu_seconds(), self._cpu_s, strict=True))
        document: dict[str, Any] = {
            "status": status,
            "wall_s": round(time.monotonic() - self._started_s, 3),
            "user_cpu_s": round(user_s, 3),
            "system_cpu_s": round(system_s, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if result is not None:
            document["result"] = dict(result)
        if error is not None:
            document["error"] = describe_error(error)
        self._guarded(lambda: self._finish(document))
        os.close(self._events_fd)
        os.close(self._lock_fd)

    def _append(self, event: Mapping[str, Any]) -> None:
        # One write of one line to an O_APPEND file: lines of several threads never mix.
        os.write(self._events_fd, (json.dumps(event, ensure_ascii=False, default=str) + "\n").encode())
        if time.monotonic() - self._synced_s > SYNC_INTERVAL_S:
            os.fsync(self._events_fd)
            self._synced_s = time.monotonic()

    def _finish(self, document: Mapping[str, Any]) -> None:
        os.fsync(self._events_fd)
        write_file(self.path / "result.json", _json_bytes(document))

    def _guarded(self, write: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            write()
        except OSError as error:
            self._broken = True
            self._warn(f"the run record {self.path} is incomplete from here on: {error.strerror}")


def open_record(
    verb: str,
    config: Mapping[str, Any],
    origins: Mapping[str, str],
    plan: Mapping[str, Any] | None,
    warn: Callable[[str], None],
) -> Record | None:
    """Open a record; if the home cannot be written, warn and return None."""
    runs = home() / "runs"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}-{secrets.token_hex(3)}"
    making = runs / f".{name}.new"
    try:
        making.mkdir(parents=True)
        lock_fd = os.open(making / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        described: dict[str, Any] = {
            "verb": verb,
            "argv": sys.argv[1:],
            "config": dict(config),
            "origins": dict(origins),
        }
        described |= {"directory": os.getcwd(), "process": os.getpid(), "started": time.time()}
        write_file(making / "config.json", _json_bytes(described))
        write_file(making / "environment.json", _json_bytes(environment()))
        if plan is not None:
            write_file(making / "plan.json", _json_bytes(plan))
        os.rename(making, runs / name)
        return Record(runs / name, lock_fd, warn)
    except OSError as error:
        warn(f"no run record is kept: cannot write {runs}: {error.strerror}; set FERRY_HOME to a writable place")
        return None


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return an error as the record keeps it, with its traceback."""
    lines = traceback.format_exception(error)
    described: dict[str, Any] = {"type": type(error).__name__, "traceback": "".join(lines)}
    if isinstance(error, FerryError):
        return {**error_json(error), **described}
    return {"code": "internal", "message": str(error), **described}


def error_json(error: FerryError) -> dict[str, Any]:
    """Return an error as `--json` prints it."""
    return {
        "code": error.code,
        "message": error.message,
        "repair": error.repair,
        "exit_status": error.exit_status,
    }


def peak_rss_bytes() -> int:
    """Return the largest resident size this program has had."""
    if os.path.exists("/proc/self/status"):
        # Not ru_maxrss: on Linux it also remembers the process that started this one.
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _cpu_seconds() -> tuple[float, float]:
    """Return user and system CPU seconds of this process and its finished children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + children.ru_utime, own.ru_stime + children.ru_stime


def _json_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n").encode()
