"""vLLM's own server as an `Engine`: a process in its own environment, asked over HTTP on this machine only."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from ferry.core.errors import UnavailableError
from ferry.engines.endings import failed, refused, refused_whole
from ferry.engines.engine import Condition, EngineInfo, EngineSettings
from ferry.engines.hardware import Place
from ferry.engines.model_facts import read_facts
from ferry.engines.request import Output, Request, Stats
from ferry.engines.server_process import LOCAL, Launch, ServerProcess
from ferry.engines.totals import Totals, without_gauges
from ferry.engines.vllm_command import command, dtype_word, explain, variables
from ferry.engines.vllm_environment import Environment, adapter_for, is_known
from ferry.engines.vllm_requests import body_of, output_of

if TYPE_CHECKING:
    import httpx

METRICS = {
    "num_running": ("num_requests_running",),
    "num_waiting": ("num_requests_waiting",),
    "kv_used": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "num_prompt_tokens": ("prompt_tokens_total",),
    "num_generated_tokens": ("generation_tokens_total",),
    "num_prefix_queried_tokens": ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total"),
    "num_prefix_hit_tokens": ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total"),
    "num_preemptions": ("num_preemptions_total",),
}
"""What vLLM's releases call the figures of `Stats`."""
SAMPLE = re.compile(r"^vllm:(\w+)(?:\{(.*)\})? ([-+.\w]+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
NAME = "vLLM"


class VllmEngine:
    """An `Engine` around a vLLM server."""

    def __init__(self, name: str, settings: EngineSettings, environment: Environment, place: Place) -> None:
        import httpx

        self._name = name
        self._settings = settings
        self._environment = environment
        self._place = place
        self._adapter = adapter_for(environment.version)
        self._facts = read_facts(settings.model)
        self._key = secrets.token_urlsafe(32)
        self._info: EngineInfo | None = None
        self._totals = Totals()
        self._server = ServerProcess(name, self._prepare, self._is_ready, settings.log_file)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # a proxy has no business between two processes of one machine
        )

    @property
    def condition(self) -> Condition:
        """What it is doing."""
        return self._server.condition

    @property
    def info(self) -> EngineInfo:
        """What it is; raise UnavailableError before it was ready."""
        if self._info is None:
            raise UnavailableError(f"the engine is not ready: {self.condition.reason}", code="engine.not-ready")
        return self._info

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

        if self.condition.state != "ready":
            yield failed(request, f"the engine is {self.condition.state}")
            return
        body = body_of(request, self._adapter, self.info.max_model_len)
        is_finished = False
        try:
            async with self._client.stream("POST", self._url("/v1/completions"), json=body) as response:
                if response.status_code != httpx.codes.OK:
                    yield refused_whole(request, NAME, response.status_code, await response.aread())
                    return
                outputs = _streamed(request, response) if body.get("stream") else _whole(request, response)
                async for output in outputs:
                    is_finished = output.finish is not None
                    yield output
        except httpx.HTTPError as error:
            if not is_finished:
                yield await self._ended(request, f"the connection to vLLM broke ({type(error).__name__})")
            return
        if not is_finished:
            yield await self._ended(request, "vLLM's answer ended in the middle")

    async def stats(self) -> Stats:
        """Return what vLLM's own metrics say; what they said last where they are silent."""
        import httpx

        process = self.condition.num_restarts
        if self.condition.state != "ready":
            return without_gauges(self._totals.of(None, process))
        try:
            return self._totals.of(stats_of(await self._metrics()), process)
        except httpx.HTTPError:
            return self._totals.of(None, process)

    async def close(self) -> None:
        """End the server and all that it started."""
        await self._server.close()
        await self._client.aclose()

    def _prepare(self, port: int) -> Launch:
        words = command(self._settings, self._environment, self._adapter, self._facts, self._place, port)
        return Launch(words, variables(self._settings, self._environment, self._key), port)

    async def _is_ready(self, port: int) -> bool:
        import httpx

        try:
            answer = await self._client.get(f"http://{LOCAL}:{port}/health", timeout=5.0)
            if answer.status_code != httpx.codes.OK:
                return False
            self._info = await self._look()
        except httpx.HTTPError:
            return False
        return True

    async def _look(self) -> EngineInfo:
        """Ask a server that has come up what it is."""
        answer = await self._client.get(self._url("/v1/models"))
        answer.raise_for_status()
        model: Mapping[str, Any] = answer.json()["data"][0]
        notes = list(explain(self._settings, self._environment, self._facts))
        if not is_known(self._environment.version):
            notes.append(
                f"vllm {self._environment.version} is newer than all that Ferry knows: spoken to as the newest"
            )
        return EngineInfo(
            name=self._name,
            num_tokens=self._facts.vocab_size,
            max_model_len=int(model.get("max_model_len") or self._facts.max_positions),
            dtype=dtype_word(self._settings, self._environment, self._facts),
            scheme=self._facts.scheme,
            kv_cache_tokens=cache_tokens_of(await self._metrics()),
            threads=self._settings.threads or 0,
            notes=tuple(notes),
        )

    async def _metrics(self) -> str:
        return (await self._client.get(self._url("/metrics"), timeout=5.0)).text

    def _url(self, path: str) -> str:
        return f"http://{LOCAL}:{self._server.port}{path}"

    async def _ended(self, request: Request, reason: str) -> Output:
        await self._server.settle()
        if self.condition.state == "closed":
            return Output(request.id, finish="cancelled")
        return failed(request, reason)


def stats_of(metrics: str) -> Stats:
    """Return the figures in a page of vLLM's metrics; those of several engines are added."""
    sums: dict[str, float] = {}
    for name, _, value in SAMPLE.findall(metrics):
        sums[name] = sums.get(name, 0.0) + float(value)
    found = {field: next((sums[name] for name in names if name in sums), 0.0) for field, names in METRICS.items()}
    share = found.pop("kv_used")
    return Stats(kv_used=share, **{field: int(value) for field, value in found.items()})


def cache_tokens_of(metrics: str) -> int:
    """Return the tokens that the cache holds; 0 where the metrics do not say."""
    for name, labels, _ in SAMPLE.findall(metrics):
        if name == "cache_config_info":
            said = dict(LABEL.findall(labels))
            sizes = [said.get(key, "") for key in ("num_gpu_blocks", "block_size")]
            return int(sizes[0]) * int(sizes[1]) if all(size.isdigit() for size in sizes) else 0
    return 0


async def _streamed(request: Request, response: httpx.Response) -> AsyncIterator[Output]:
    """Yield the pieces of a streamed answer. The last one waits for the usage behind it, with the cached tokens."""
    last: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] | None = None
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        said: Mapping[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in said:
            yield refused(request, NAME, said["error"])
            return
        usage = said.get("usage") or usage
        for choice in said.get("choices") or ():
            if choice.get("finish_reason") is not None:
                last = choice
            elif choice.get("token_ids"):
                yield output_of(request, choice)
    if last is not None:
        yield output_of(request, last, usage)


async def _whole(request: Request, response: httpx.Response) -> AsyncIterator[Output]:
    said: Mapping[str, Any] = json.loads(await response.aread())
    yield output_of(request, said["choices"][0], said.get("usage"))
