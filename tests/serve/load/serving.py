"""`ferry serve` as a process of its own, seen from outside: what it says, its engine's process, its memory, its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

PATIENCE_S = 60.0
LOOK_S = 0.02
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Server:
    """A server, on a free port where none is given. Close it at the end, whatever happened."""

    def __init__(self, model: Path, home: Path, *words: str, cache: str = "16MB", port: int = 0) -> None:
        command = [sys.executable, "-m", "ferry", "serve", str(model), "--port", str(port), "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, "--kv-cache-memory", cache, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FERRY_HOME": str(home)},
        )
        self.errors = Lines(self.process)
        self.url = ""

    def listening(self) -> Server:
        """Return when it listens."""
        self.url = self.errors.wait_for("listening on ").split("listening on ")[1].split(";")[0]
        return self

    def ready(self) -> Server:
        """Return when it answers."""
        self.listening()
        self.errors.wait_for("ready after")
        return self

    @property
    def engine_id(self) -> int:
        """The process of its engine; 0 while there is none."""
        found = [one for one in children_of(self.process.pid) if "native.child" in command_of(one)]
        return found[0] if found else 0

    def client(self, timeout_s: float = PATIENCE_S) -> httpx.AsyncClient:
        """Return a client with as many connections as are wanted."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=timeout_s, limits=limits)

    def metrics(self) -> Metrics:
        """Return what it counts now."""
        return Metrics(httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text)

    def rest(self) -> Metrics:
        """Return what it counts once nothing is left to do and all blocks of the cache are free."""
        found: list[Metrics] = []

        def is_at_rest() -> bool:
            found[:] = [self.metrics()]
            names = ("requests_inside", "requests_waiting", "engine_running", "engine_waiting", "kv_cache_used_ratio")
            return all(found[0].sum(f"ferry_{name}") == 0 for name in names)

        wait_until(is_at_rest)
        return found[0]

    def end(self, signum: int = signal.SIGTERM, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """Send it a signal; return its exit status and its screen."""
        self.process.send_signal(signum)
        return self.ended(timeout_s)

    def ended(self, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """Return its exit status and its screen once it has ended."""
        status = self.process.wait(timeout_s)
        assert self.process.stdout is not None
        return status, self.process.stdout.read()

    def close(self) -> None:
        """See that nothing is left of it."""
        engine_id = self.engine_id
        self.process.kill()
        self.process.wait()
        if engine_id and is_alive(engine_id):
            # A stopped process does not see that its parent has gone.
            os.kill(engine_id, signal.SIGKILL)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                self.errors.join()
                stream.close()


class Lines(threading.Thread):
    """The lines that a process writes to stderr, and waiting for one of them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._more = threading.Condition()
        self._has_ended = False
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        """Read all lines."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()
        with self._more:
            self._has_ended = True
            self._more.notify_all()

    def wait_for(self, word: str) -> str:
        """Return the first line with a word in it."""
        with self._more:
            self._more.wait_for(lambda: self._has_ended or self._find(word), PATIENCE_S)
            assert self._find(word), f"no {word!r} in {''.join(self.lines)}"
            return self._find(word)

    def text(self) -> str:
        """Return all that was written until its end."""
        self.join(PATIENCE_S)
        return "".join(self.lines)

    def _find(self, word: str) -> str:
        return next((line for line in self.lines if word in line), "")


class Metrics:
    """One page of `/metrics`."""

    def __init__(self, page: str) -> None:
        self._samples = [(name, labels or "", float(value)) for name, labels, value in SAMPLE.findall(page)]

    def sum(self, name: str, *labels: str) -> float:
        """Return the sum of all samples of a name that have some labels, written as `status="200"`."""
        return sum(
            value for own, text, value in self._samples if own == name and all(label in text for label in labels)
        )


def wait_until(is_so: Callable[[], bool], patience_s: float = PATIENCE_S) -> float:
    """Return after how many seconds something was so; fail if it never is."""
    begun_s, look = time.monotonic(), threading.Event()
    while not is_so():
        assert time.monotonic() - begun_s < patience_s, "it never came true"
        look.wait(LOOK_S)
    return time.monotonic() - begun_s


async def until(is_so: Callable[[], bool], patience_s: float = PATIENCE_S) -> float:
    """Do the same without stopping an event loop."""
    return await asyncio.to_thread(wait_until, is_so, patience_s)


def is_ready(url: str) -> bool:
    """Return whether a server takes requests."""
    return httpx.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200


def is_alive(process_id: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    return _status(process_id).get("State", "Z")[0] not in "ZX"


def memory_of(process_id: int) -> int:
    """Return the bytes of memory that a process has for itself."""
    return int(_status(process_id)["VmRSS"].split()[0]) * 1024


def children_of(process_id: int) -> list[int]:
    """Return the processes that a process started."""
    found: list[int] = []
    for task in Path(f"/proc/{process_id}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def command_of(process_id: int) -> str:
    """Return the words that a process was started with."""
    try:
        return Path(f"/proc/{process_id}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _status(process_id: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
