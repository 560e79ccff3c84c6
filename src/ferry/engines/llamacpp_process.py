"""llama.cpp's server as an `Engine`: a child process, asked over HTTP on this machine only.

The slots of the server share one cache, and it fails requests when the cache is full. So a request waits here until the
tokens it may come to have are free.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ferry.core.environment import usable_cores
from ferry.core.errors import UnavailableError
from ferry.core.interpreter import module_words
from ferry.engines.endings import failed, refused, refused_whole
from ferry.engines.engine import Condition, EngineInfo, EngineSettings
from ferry.engines.grammar_guard import GrammarGuard
from ferry.engines.hardware import Place
from ferry.engines.llamacpp_requests import Stream, body_of, ids_by_bytes, missing, num_tokens, whole_answer
from ferry.engines.llamacpp_server import KEY_VARIABLE
from ferry.engines.model_facts import read_facts
from ferry.engines.preflight import compute_dtype, plan_memory
from ferry.engines.request import Output, Request, Stats
from ferry.engines.server_process import LOCAL, Launch, ServerProcess
from ferry.engines.text import open_text
from ferry.engines.totals import Totals, without_gauges
from ferry.guided.refusal import Refusal

if TYPE_CHECKING:
    import httpx

NAME = "llama.cpp"
MAX_SLOTS = 32
"""Answers at the same time: each slot has buffers of its own."""
CACHE_STEP = 256
SAMPLE = re.compile(r"^llamacpp:(\w+) ([-+.\w]+)$", re.MULTILINE)
LEFT_THE_GRAMMAR = "llama.cpp left the grammar: its llguidance does not take this one; use --engine native"


class LlamacppEngine:
    """An `Engine` around llama.cpp's server."""

    def __init__(self, settings: EngineSettings, place: Place) -> None:
        import httpx

        self._settings = settings
        self._facts = read_facts(settings.model)
        memory = plan_memory(self._facts, settings, place, compute_dtype(self._facts, settings, on_cpu=True))
        self._max_model_len = memory.max_model_len
        self._cache_tokens = max(memory.cache_tokens, memory.max_model_len) // CACHE_STEP * CACHE_STEP or CACHE_STEP
        self._notes = memory.notes
        self._threads = settings.threads or usable_cores()
        self._slots = min(settings.max_num_seqs, MAX_SLOTS)
        self._room = _Room(self._cache_tokens, self._slots)
        text = open_text(settings.model)
        self._vocabulary = text.vocabulary
        self._guard = GrammarGuard(text, self._facts.vocab_size)
        self._ids = ids_by_bytes(self._vocabulary, self._vocabulary.num_tokens)
        self._key = secrets.token_urlsafe(32)
        self._is_up = False
        self._totals = Totals()
        self._server = ServerProcess("llamacpp", self._prepare, self._is_ready, settings.log_file)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._slots),
            trust_env=False,
        )

    @property
    def condition(self) -> Condition:
        """What it is doing."""
        return self._server.condition

    @property
    def info(self) -> EngineInfo:
        """What it is; raise UnavailableError before it was ready."""
        if not self._is_up:
            raise UnavailableError(f"the engine is not ready: {self.condition.reason}", code="engine.not-ready")
        return EngineInfo(
            name="llamacpp",
            num_tokens=self._facts.vocab_size,
            max_model_len=self._max_model_len,
            dtype="float32",
            scheme="GGUF",
            kv_cache_tokens=self._cache_tokens,
            weights_bytes=self._facts.integer_bytes,
            threads=self._threads,
            notes=self._notes,
        )

    @property
    def process_id(self) -> int | None:
        """The number of the process that holds the server, if there is one."""
        return self._server.process_id

    async def start(self) -> None:
        """Return when the server answers."""
        await self._server.start()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield the outputs of a request; closing the iterator closes the connection, which cancels it."""
        import httpx

        lacking = missing(request.sampling)
        if lacking:
            message = f"engine llamacpp does not have {', '.join(lacking)}: leave it out, or use --engine native"
            yield failed(request, message, "engine.request")
            return
        if self.condition.state != "ready":
            yield failed(request, f"the engine is {self.condition.state}")
            return
        try:
            watch = await self._guard.watch(request.grammar) if request.grammar else None
        except Refusal as refusal:
            yield failed(request, refusal.message, refusal.code)
            return
        body = body_of(request, self._max_model_len, prefix_caching=self._settings.prefix_caching)
        is_finished = False
        async with self._room.taken(len(request.prompt_ids) + num_tokens(request, self._max_model_len)):
            try:
                url = f"http://{LOCAL}:{self._server.port}/completion"
                async with self._client.stream("POST", url, json=body) as response:
                    if response.status_code != httpx.codes.OK:
                        yield refused_whole(request, NAME, response.status_code, await response.aread())
                        return
                    async for output in self._outputs(request, response, is_streamed=bool(body["stream"])):
                        if watch is not None and not watch.keeps(output.token_ids):
                            yield failed(request, LEFT_THE_GRAMMAR, "guided.engine")
                            return
                        is_finished = output.finish is not None
                        yield output
                        if is_finished:
                            return
            except httpx.HTTPError as error:
                if is_finished:
                    return
                reason = f"the connection to llama.cpp broke ({type(error).__name__})"
            else:
                reason = "llama.cpp's answer ended in the middle"
        yield await self._ended(request, reason)

    async def stats(self) -> Stats:
        """Return what llama.cpp's metrics say, and what waits here."""
        import httpx

        process = self.condition.num_restarts
        if self.condition.state != "ready":
            return without_gauges(self._totals.of(None, process))
        try:
            answer = await self._client.get(f"http://{LOCAL}:{self._server.port}/metrics", timeout=5.0)
        except httpx.HTTPError:
            return self._totals.of(None, process)
        found = {name: float(value) for name, value in SAMPLE.findall(answer.text)}
        computed, cached = (int(found.get(f"prompt_tokens_{kind}total", 0)) for kind in ("", "cached_"))
        now = Stats(
            num_running=int(found.get("requests_processing", 0)),
            num_waiting=self._room.num_waiting + int(found.get("requests_deferred", 0)),
            kv_used=self._room.share_taken,
            num_prompt_tokens=computed + cached,
            num_generated_tokens=int(found.get("tokens_predicted_total", 0)),
            num_prefix_queried_tokens=computed + cached,
            num_prefix_hit_tokens=cached,
            num_steps=int(found.get("n_decode_total", 0)),
        )
        return self._totals.of(now, process)

    async def close(self) -> None:
        """End the server."""
        await self._server.close()
        await self._client.aclose()

    def _prepare(self, port: int) -> Launch:
        said = {
            "model": str(self._settings.model.absolute()),
            "port": port,
            "num_cache_tokens": self._cache_tokens,
            "num_slots": self._slots,
            "num_batched_tokens": max(self._settings.max_num_batched_tokens, self._slots),
            "prefix_caching": self._settings.prefix_caching,
            "threads": self._threads,
        }
        words = [*module_words("ferry.engines.llamacpp_server"), json.dumps(said)]
        return Launch(words, {**os.environ, KEY_VARIABLE: self._key}, port)

    async def _is_ready(self, port: int) -> bool:
        import httpx

        try:
            answer = await self._client.get(f"http://{LOCAL}:{port}/health", timeout=5.0)
        except httpx.HTTPError:
            return False
        self._is_up = self._is_up or answer.status_code == httpx.codes.OK
        return answer.status_code == httpx.codes.OK

    async def _ended(self, request: Request, reason: str) -> Output:
        await self._server.settle()
        if self.condition.state == "closed":
            return Output(request.id, finish="cancelled")
        return failed(request, reason)

    async def _outputs(self, request: Request, response: httpx.Response, *, is_streamed: bool) -> AsyncIterator[Output]:
        if not is_streamed:
            yield whole_answer(request, json.loads(await response.aread()))
            return
        stream = Stream(request, self._vocabulary, self._ids)
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            said: Mapping[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in said:
                yield refused(request, NAME, said["error"])
                return
            output = stream.take(said)
            if output is not None:
                yield output


class _Room:
    """Tokens of the cache and slots of the server, first come, first served."""

    def __init__(self, num_tokens: int, num_slots: int) -> None:
        self._total = self._free = num_tokens
        self._slots = num_slots
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._queue)

    @property
    def share_taken(self) -> float:
        """Share of the tokens that requests hold."""
        return 1 - self._free / self._total

    @asynccontextmanager
    async def taken(self, number: int) -> AsyncIterator[None]:
        """Hold so many tokens and a slot; a request that is longer than all of it holds all."""
        number = min(number, self._total)
        admitted = asyncio.get_running_loop().create_future()
        self._queue.append((number, admitted))
        self._admit()
        try:
            await admitted
            yield
        finally:
            if admitted.done() and not admitted.cancelled():
                self._free += number
                self._slots += 1
            elif (number, admitted) in self._queue:
                self._queue.remove((number, admitted))
            self._admit()

    def _admit(self) -> None:
        while self._queue and self._slots and self._queue[0][0] <= self._free:
            number, admitted = self._queue.popleft()
            if admitted.cancelled():
                continue
            self._free -= number
            self._slots -= 1
            admitted.set_result(None)
