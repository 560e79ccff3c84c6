"""What an inference engine is to the rest of Ferry, and how engines are found. A new engine is a new file.

A file of this folder that holds an `ENGINE` is one. `available()` and `runs()` say without loading anything whether it
can be used here and for this model; `make()` returns it, not started. The front end sees `Engine` only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from ferry.core.errors import UnavailableError, did_you_mean
from ferry.engines.hardware import Place, machine
from ferry.engines.request import Output, Request, Stats

State = Literal["starting", "ready", "restarting", "failed", "closed"]


@dataclass(frozen=True)
class EngineSettings:
    """All that an engine is told. Values of None are the engine's to choose; what it chose is in `EngineInfo.notes`."""

    model: Path
    dtype: str = "auto"
    """auto, float32, bfloat16, float16."""
    quantization: str = ""
    """"" = as the checkpoint is; `w8a8` = weights and activations rounded to 8 bits while loading."""
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    prefix_caching: bool = True
    tensor_parallel_size: int = 1
    threads: int | None = None
    trust_remote_code: bool = False
    seed: int = 0
    environment: Path | None = None
    """The virtual environment of an engine that lives in its own; None = where it is looked for."""
    log_file: Path | None = None
    """Where a separate process writes what it says; None = stderr."""
    further: tuple[str, ...] = ()
    """Words handed to the engine's own command as they are."""


class EngineInfo(NamedTuple):
    """What a started engine is."""

    name: str
    num_tokens: int
    """Width of the logits: token ids are below it."""
    max_model_len: int
    dtype: str
    scheme: str = ""
    """W8A8 and the like; "" = float."""
    kv_cache_tokens: int = 0
    weights_bytes: int = 0
    threads: int = 0
    notes: tuple[str, ...] = ()
    """What was chosen and why, one sentence each, for the screen."""


class Condition(NamedTuple):
    """What an engine is doing. `reason` is for people where it is not ready."""

    state: State
    reason: str = ""
    num_restarts: int = 0
    last_death: str = ""
    """Why it was started again the last time; it stays when the engine is ready again."""


class Engine(Protocol):
    """A running engine, as asyncio code sees it. All methods are called from one event loop."""

    @property
    def condition(self) -> Condition: ...

    @property
    def info(self) -> EngineInfo:
        """Raise UnavailableError before it was ready once."""
        ...

    async def start(self) -> None:
        """Return when it is ready; raise FerryError where it cannot be. Later deaths are restarted by the engine."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Return the outputs of a request, the last one with a `finish`. Closing the iterator cancels the request.

        An engine that dies under it ends it with finish `error` and code `engine.lost`.
        """
        ...

    async def stats(self) -> Stats: ...

    async def close(self) -> None:
        """End it, and all that it started. Requests that run end with finish `cancelled`."""
        ...


class Verdict(NamedTuple):
    """Whether an engine can be used, and why (not), in one sentence with what to do about it."""

    usable: bool
    reason: str
    remedy: str = ""
    """What would make an engine usable that suits this machine and model; "" where nothing simple does."""


def _always(settings: EngineSettings) -> Verdict:
    return Verdict(True, "")


def _this_machine(settings: EngineSettings) -> Place:
    return machine()


def _never(settings: EngineSettings) -> bool:
    return False


@dataclass(frozen=True)
class EngineKind:
    """One kind of engine. `rank`: the order in which `auto` tries them, lowest first."""

    name: str
    rank: int
    summary: str
    available: Callable[[EngineSettings], Verdict]
    """Whether its packages, environment and hardware are here."""
    runs: Callable[[EngineSettings], Verdict]
    """Whether it runs this model with these settings. Reads headers and config.json only."""
    make: Callable[[EngineSettings], Engine]
    options: frozenset[str] = field(default_factory=frozenset)
    """Fields of EngineSettings that it does not follow: one that is set is refused, not ignored."""
    wanted: Callable[[EngineSettings], Verdict] = _always
    """Whether `auto` may take it: what can be used here may still not be what anybody wants, as vLLM on a CPU."""
    place: Callable[[EngineSettings], Place] = _this_machine
    """The memory it puts a model into, for what is refused before it starts."""
    widens: Callable[[EngineSettings], bool] = _never
    """Whether it holds weights as they are stored, and computes and caches in float32 whatever the hardware has."""


def kinds() -> dict[str, EngineKind]:
    """Return every kind of engine by name, the preferred one first."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*_engine.py")):
        found.append(import_module(f"ferry.engines.{path.stem}").ENGINE)
    return {kind.name: kind for kind in sorted(found, key=lambda kind: kind.rank)}


def find(name: str) -> EngineKind:
    """Return a kind of engine by its name."""
    known = kinds()
    if name not in known:
        raise UnavailableError(f"no engine {name!r}{did_you_mean(name, list(known))}", code="engine.unknown")
    return known[name]
