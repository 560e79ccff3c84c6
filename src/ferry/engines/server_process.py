"""A server of an engine as a child process: started, waited for, its log read, started again after each death, ended.

What is asked of it is the caller's matter. The process gets a port and a secret of its own each time, on this machine
only, and a leash: it ends with the process that started it, whatever that one dies of.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from ferry.core.errors import FerryError, UnavailableError
from ferry.engines import leash
from ferry.engines.engine import Condition
from ferry.engines.log_lines import Log

LOCAL = "127.0.0.1"
PAUSES_S = (0.0, 1.0, 4.0, 15.0, 60.0)
"""Before the first, second ... restart in a row. After the last the engine has failed."""
WELL_AFTER_S = 60.0
"""A process that was ready so long starts a new row."""
POLL_S = 0.2
ENDING_S = leash.PATIENCE_S + 5
SETTLING_S = 2.0
GROUP_S = 5.0
CHUNK_BYTES = 1 << 16


class Launch(NamedTuple):
    """What is started: a command, its environment variables, and the port it was told to listen on."""

    command: list[str]
    variables: Mapping[str, str]
    port: int


Prepare = Callable[[int], Launch]
"""Returns what to start on a port."""
IsReady = Callable[[int], Awaitable[bool]]
"""Says whether the server on this port answers. May raise FerryError where it never will."""


class ServerProcess:
    """One server at a time, of the engine `name`."""

    def __init__(self, name: str, prepare: Prepare, is_ready: IsReady, log_file: Path | None) -> None:
        self._name = name
        self._prepare = prepare
        self._is_ready = is_ready
        self._log_file = log_file
        self._log = Log(name)
        self._condition = Condition("starting", "not started yet")
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def condition(self) -> Condition:
        """What it is doing."""
        return self._condition

    @property
    def process_id(self) -> int | None:
        """The number of the process on its leash, if there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Return when the server answers; raise UnavailableError with the reason in its log where it ends before."""
        self._condition = Condition("starting", "the process is starting")
        try:
            await self._launch()
        except FerryError as error:
            self._condition = Condition("failed", str(error))
            raise
        self._condition = Condition("ready")
        self._keeper = asyncio.create_task(self._keep())

    async def settle(self) -> None:
        """Give a death that a broken connection told of first the time to be noticed."""
        if self._process is not None and self._condition.state == "ready":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), SETTLING_S)
            await asyncio.sleep(0)

    async def close(self) -> None:
        """End it, and all that it started."""
        self._condition = Condition("closed", "", self._condition.num_restarts)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._end()

    async def _launch(self) -> None:
        """Start a process and wait until it answers."""
        self.port = free_port()
        self._log = Log(self._name)
        launch = self._prepare(self.port)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", leash.__file__, *launch.command,
            stdin=PIPE, stdout=PIPE, stderr=STDOUT, env=dict(launch.variables), start_new_session=True,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read(self._process))
        try:
            while self._process.returncode is None:
                if await self._is_ready(self.port):
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._process.wait(), POLL_S)
        except BaseException:
            await self._end()
            raise
        status = await self._end()
        raise self._failure(status)

    async def _keep(self) -> None:
        """Start another server whenever this one dies, after ever longer pauses."""
        num_deaths = 0
        while True:
            since_s = time.monotonic()
            assert self._process is not None
            status = await self._process.wait()
            reason = f"the process ended ({how_ended(status)})"
            self._condition = Condition("restarting", reason, self._condition.num_restarts + 1, reason)
            await self._end()
            num_deaths = 0 if time.monotonic() - since_s > WELL_AFTER_S else num_deaths
            reason = str(self._failure(status))
            self._condition = self._condition._replace(reason=reason, last_death=reason)
            while self._condition.state == "restarting":
                if num_deaths == len(PAUSES_S):
                    self._condition = self._condition._replace(state="failed")
                    return
                await asyncio.sleep(PAUSES_S[num_deaths])
                num_deaths += 1
                try:
                    await self._launch()
                except (FerryError, OSError) as error:
                    self._condition = self._condition._replace(reason=str(error))
                else:
                    self._condition = self._condition._replace(state="ready", reason="")

    async def _read(self, process: Process) -> None:
        """Follow what the process writes until it ends."""
        assert process.stdout is not None
        rest = b""
        with _opened(self._log_file) as file:
            while chunk := await process.stdout.read(CHUNK_BYTES):
                file.write(chunk)
                file.flush()
                # Bars of progress end with a carriage return.
                *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    self._understand(line.decode("utf-8", "replace"))
        self._understand(rest.decode("utf-8", "replace"))

    def _understand(self, line: str) -> None:
        found = self._log.add(line)
        if found is not None and found.kind == "progress" and self._condition.state in ("starting", "restarting"):
            self._condition = self._condition._replace(reason=found.text)

    async def _end(self) -> int:
        """See that the process and its group have ended, and return how."""
        process = self._process
        if process is None:
            return 0
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), ENDING_S)
        except asyncio.TimeoutError:
            process.kill()
        await _end_group(process.pid)
        status = await process.wait()
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=ENDING_S)
        self._process = None
        return status

    def _failure(self, status: int) -> UnavailableError:
        how = f"the process of engine {self._name} ended ({how_ended(status)})"
        known = self._log.failure()
        where = f" The whole log: {self._log_file}" if self._log_file is not None else ""
        if known is not None:
            return UnavailableError(f"{how}: {known.text}", code="engine.start", repair=f"{known.repair}.{where}")
        if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
            where = f"a kill from outside mostly means that memory ran out: use a smaller model.{where}"
        tail = self._log.tail()
        return UnavailableError(
            f"{how}{f'; its last words: {tail}' if tail else ''}", code="engine.start", repair=where.strip()
        )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as trial:
        trial.bind((LOCAL, 0))
        return int(trial.getsockname()[1])


async def _end_group(group: int) -> None:
    """End what a program started and left behind, and wait until its memory is free again."""
    until_s = time.monotonic() + GROUP_S
    while time.monotonic() < until_s:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        await asyncio.sleep(POLL_S / 4)


def how_ended(status: int) -> str:
    """Return an exit status in words; programs on a leash report a signal as 128 + n."""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"signal {signal.Signals(number).name}"
    return f"exit status {status}"


def _opened(path: Path | None) -> IO[bytes]:
    """Open the log for more; without one, standard error."""
    if path is None:
        return os.fdopen(os.dup(2), "wb")
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab")
