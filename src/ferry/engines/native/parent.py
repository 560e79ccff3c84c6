"""The native engine as asyncio code sees it: a child process, started again after each death, and who waits for what.

A request that a death finds running ends with `engine.lost`. Restarts come at once, then after ever longer pauses; a
child that dies again and again without having lived a while is given up. One that is silent for long hangs, and is
ended. Nothing here waits for a lock or a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from typing import Any

from ferry.core.errors import UnavailableError
from ferry.core.interpreter import module_words
from ferry.engines.engine import Condition, EngineInfo, EngineSettings
from ferry.engines.native import messages
from ferry.engines.native.watch import SILENCE_S, Watch
from ferry.engines.request import Output, Request, Stats
from ferry.engines.totals import added, without_gauges

PAUSES_S = (0.0, 0.5, 2.0, 8.0, 30.0)
"""Before the first, second ... restart in a row. After the last the engine has failed."""
WELL_AFTER_S = 60.0
"""A child that lived so long starts a new row."""
ENDING_S = 5.0
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}
"""Threads of a parallel region that have nothing to do sleep: others want the cores."""


class ChildEngine:
    """An `Engine` around a child process."""

    def __init__(self, settings: EngineSettings, silence_s: float = SILENCE_S) -> None:
        self._settings = settings
        self._silence_s = silence_s
        self._condition = Condition("starting", "not started yet")
        self._info: EngineInfo | None = None
        self._stats = Stats()
        self._before = Stats()
        """Counters of the children that are gone."""
        self._process: Process | None = None
        self._watch: Watch | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Queue[Output]] = {}

    @property
    def condition(self) -> Condition:
        """What it is doing."""
        return self._condition

    @property
    def info(self) -> EngineInfo:
        """What it is; raise UnavailableError before it was ready."""
        if self._info is None:
            raise UnavailableError(f"the engine is not ready: {self._condition.reason}", code="engine.not-ready")
        return self._info

    @property
    def process_id(self) -> int | None:
        """The number of the child process, if there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Return when a child is ready; raise what it could not start for."""
        self._condition = Condition("starting", "the model is being loaded")
        try:
            reader = await self._spawn()
        except Exception as error:
            if self._condition.state != "closed":
                self._condition = Condition("failed", str(error))
            raise
        self._condition = Condition("ready")
        self._keeper = asyncio.create_task(self._keep(reader))

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield the outputs of a request."""
        if self._condition.state != "ready" or self._writer is None:
            yield _lost(request.id, f"the engine is {self._condition.state}")
            return
        assert request.id not in self._waiting, f"two requests are called {request.id}"
        arrived = self._waiting[request.id] = asyncio.Queue[Output]()
        is_finished = False
        try:
            self._writer.write(messages.frame("add", messages.request_to_json(request)))
            while not is_finished:
                output = await arrived.get()
                is_finished = output.finish is not None
                yield output
        finally:
            self._waiting.pop(request.id, None)
            if not is_finished and self._writer is not None:
                self._writer.write(messages.frame("cancel", request.id))

    async def stats(self) -> Stats:
        """Return the gauges of this child, and the counters of all."""
        # The child says how many it has taken in; what it has yet to take in waits too.
        num_waiting = max(0, len(self._waiting) - self._stats.num_running)
        return self._stats._replace(num_waiting=num_waiting)

    async def close(self) -> None:
        """End the child and what follows it."""
        self._condition = Condition("closed", "", self._condition.num_restarts)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._bury()
        self._end_all([Output(name, finish="cancelled") for name in self._waiting])

    async def _spawn(self) -> asyncio.StreamReader:
        """Start a child and return its reader when it is ready."""
        ours, theirs = socket.socketpair()
        try:
            self._process = await self._fork(theirs)
        finally:
            theirs.close()
        self._watch = Watch(self._process, self._silence_s)
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            self._check_open()
            self._writer.write(messages.frame("settings", messages.settings_to_json(self._settings)))
            kind, content = await self._read(reader)
            if kind == "failed":
                raise messages.error_from_json(content)
            info = messages.info_from_json(content)
            self._check_open()
        except (EOFError, OSError):
            end = await self._bury()
            raise UnavailableError(
                f"the engine's process ended while it started ({end})",
                code="engine.start",
                repair=self._where_to_look(end),
            ) from None
        except BaseException:
            await self._bury()
            raise
        self._info = info
        return reader

    async def _fork(self, theirs: socket.socket) -> Process:
        with contextlib.ExitStack() as stack:
            log = None
            if self._settings.log_file is not None:
                self._settings.log_file.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(open(self._settings.log_file, "ab"))
            return await asyncio.create_subprocess_exec(
                *module_words("ferry.engines.native.child"), str(theirs.fileno()),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(theirs.fileno(),),
                env={**QUIET_THREADS, **os.environ}, start_new_session=True,
            )  # fmt: skip

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Hand out what the child says; when it dies, start another."""
        loop = asyncio.get_running_loop()
        born_s, num_deaths = loop.time(), 0
        while True:
            said = ""
            try:
                await self._hand_out(reader)
            except (EOFError, OSError):
                end = await self._bury()
            except Exception as error:  # noqa: BLE001 - a death like another
                # Whoever waits must not wait for a child that cannot be understood.
                said = f"what it said cannot be read: {type(error).__name__}: {error}; "
                end = await self._bury(kill=True)
            if loop.time() - born_s > WELL_AFTER_S:
                num_deaths = 0
            reason = f"the engine's process ended ({said}{end})"
            self._condition = Condition("restarting", reason, self._condition.num_restarts + 1, reason)
            self._end_all([_lost(name, f"{reason}; it is started again") for name in self._waiting])
            started = None
            while started is None:
                if num_deaths == len(PAUSES_S):
                    self._condition = self._condition._replace(state="failed")
                    return
                await asyncio.sleep(PAUSES_S[num_deaths])
                num_deaths += 1
                started = await self._try_again()
            reader, born_s = started, loop.time()
            self._condition = self._condition._replace(state="ready", reason="")

    async def _try_again(self) -> asyncio.StreamReader | None:
        try:
            return await self._spawn()
        except Exception as error:  # noqa: BLE001 - it is told, and tried again
            self._condition = self._condition._replace(reason=str(error))
            return None

    async def _hand_out(self, reader: asyncio.StreamReader) -> None:
        """Give outputs to who waits for them, until the child is gone."""
        while True:
            _, (outputs, stats) = await self._read(reader)
            self._stats = added(self._before, messages.stats_from_json(stats))
            for output in messages.outputs_from_json(outputs):
                arrived = self._waiting.get(output.request_id)
                if arrived is not None:
                    arrived.put_nowait(output)

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, Any]:
        """Return the next message that is more than a sign of life."""
        while True:
            head = await reader.readexactly(messages.LENGTH_BYTES)
            kind, content = messages.parse(await reader.readexactly(messages.length_of(head)))
            if self._watch is not None:
                self._watch.heard()
            if kind != messages.ALIVE:
                return kind, content

    async def _bury(self, *, kill: bool = False) -> str:
        """See that the child has ended, and return how. What is closed while it starts comes here twice."""
        process, self._process = self._process, None
        watch, self._watch = self._watch, None
        self._before = self._stats = without_gauges(self._stats)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if process is None or watch is None:
            return "it was gone"
        watch.end()
        try:
            await asyncio.wait_for(process.wait(), 0 if kill else ENDING_S)
        except (asyncio.TimeoutError, asyncio.CancelledError) as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if isinstance(error, asyncio.CancelledError):
                raise  # nobody comes back for it
            await process.wait()
        status = process.returncode or 0
        if watch.has_ended_it:
            return f"it hung: for {self._silence_s:g} s there was no sign of life"
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def _end_all(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._waiting[output.request_id].put_nowait(output)

    def _check_open(self) -> None:
        if self._condition.state == "closed":
            raise UnavailableError("the engine was closed while it started", code="engine.closed")

    def _where_to_look(self, end: str) -> str:
        where = f"see {self._settings.log_file}" if self._settings.log_file is not None else "see what it wrote above"
        if signal.SIGKILL.name in end:
            return f"{where}; a kill from outside mostly means that memory ran out: use a smaller or quantized model"
        return where


def _lost(request_id: str, message: str) -> Output:
    return Output(request_id, finish="error", error_code="engine.lost", error_message=message)
