"""What a worker knows about its place among the others, and how it talks to whoever started it.

A worker gets its seat from the supervisor, or, when a launcher such as torchrun has started every rank by itself, makes
one from the environment. The engine sees no difference.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ferry.core.errors import ConfigError
from ferry.verbs.train.crew.board import PHASES, Beat, Board, Phase
from ferry.verbs.train.crew.spec import DEFAULT_PORT, Cluster
from ferry.verbs.train.crew.stores import file_store, part_of, tcp_store

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

STOPPED = "stopped"
"""An entry that left early because it was asked to returns this, or a mapping whose `status` it is."""
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NUM_DURATIONS = 31
_CONNECT_LIMIT_S = 300.0
_TRAINING = PHASES.index("training")


class Seat:
    """One worker's place. `attempt` is one text on all ranks of a generation, and another one in every other."""

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        local_world_size: int = 1,
        cluster: Cluster | None = None,
        generation: int = 0,
        attempt: str = "alone",
        board: Board | None = None,
        row: int = 0,
        report: Callable[[dict[str, Any]], None] | None = None,
        file_store: Path | None = None,
        launched: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.local_world_size = local_world_size
        self.cluster = cluster or Cluster()
        self.node_rank = self.cluster.node_rank
        self.num_nodes = self.cluster.num_nodes
        self.generation = generation
        self.attempt = attempt
        self.launched = launched
        self._board = board or Board(1)
        self._row = row
        self._report = report
        self._file_store = file_store
        self._parent = os.getppid()
        self._durations_ns: deque[int] = deque(maxlen=_NUM_DURATIONS)
        self._last = self._board.read(self._row)

    def beat(self, step: int, phase: Phase = "training") -> None:
        """Show progress: step `step` (the first is 1) or another phase begins.

        In training only a new step is progress; in the other phases every call is.
        """
        if not self.launched and os.getppid() != self._parent:
            os._exit(1)  # the supervisor is gone, and this system sends no signal for that
        place, now_ns, last = PHASES.index(phase), time.monotonic_ns(), self._last
        if (place, step) == (_TRAINING, last.step) and last.phase == _TRAINING:
            return
        if last.phase == _TRAINING:
            self._durations_ns.append(now_ns - last.progress_ns)
        median_ns = int(statistics.median(self._durations_ns or [0]))
        self._last = Beat(now_ns, step, place, median_ns, len(self._durations_ns))
        self._board.write(self._row, self._last)

    def stop_requested(self) -> bool:
        """Say whether someone wants the run to end.

        Ranks may see it at different moments. Agree first, for example with the sum of tokens that is reduced over all
        ranks in every step; then save, and return `STOPPED`.
        """
        return self._board.stop_requested()

    def event(self, name: str, /, **fields: Any) -> None:
        """Note one fact for events.jsonl and the screen. May be called from several threads."""
        if self._report is not None:
            line = {"ts": round(time.time(), 3), "rank": self.rank, "generation": self.generation, **fields}
            self._report({**line, "event": name})

    def store(self) -> Store | None:
        """Return the store for `init_process_group`; none means that the launcher's `env://` is to be used."""
        if self.launched:
            return None
        if self.num_nodes == 1:
            assert self._file_store is not None, "a seat without a crew is alone and needs no store"
            _use_loopback()
            return file_store(self._file_store, self.world_size)
        tcp = tcp_store(self.cluster, is_host=False, timeout_s=_CONNECT_LIMIT_S)
        return part_of(tcp, f"generation-{self.generation}")


def seat_from_environment(
    on_event: Callable[[dict[str, Any]], None] | None = None, environ: Mapping[str, str] = os.environ
) -> Seat | None:
    """Return the seat that a launcher gave this process, or none if no launcher has started it.

    SIGTERM then asks to stop; `beat` is harmless, because nobody watches.
    """
    if any(name not in environ for name in _LAUNCHED):
        return None
    board = Board(1)

    def stop(signum: int, frame: FrameType | None) -> None:
        board.request_stop()

    signal.signal(signal.SIGTERM, stop)
    world_size = _number(environ, "WORLD_SIZE")
    num_nodes = _number(environ, "NNODES", _number(environ, "SLURM_NNODES", 1))
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", max(1, world_size // num_nodes))
    num_nodes, node_rank = max(1, world_size // local_world_size), _number(environ, "GROUP_RANK", 0)
    restarts = _number(environ, "TORCHELASTIC_RESTART_COUNT", _number(environ, "SLURM_RESTART_COUNT", 0))
    run = environ.get("TORCHELASTIC_RUN_ID") or environ.get("SLURM_JOB_ID") or "launched"
    return Seat(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=local_world_size,
        cluster=Cluster(num_nodes, node_rank, environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")),
        generation=restarts,
        attempt=f"{run}-{restarts}",
        board=board,
        report=on_event,
        launched=True,
    )


def cluster_from_environment(environ: Mapping[str, str] = os.environ) -> Cluster:
    """Return the nodes that NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (or PET_..., as torchrun has them) name."""
    named = {
        name: environ.get(name) or environ.get(f"PET_{name}") or ""
        for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    num_nodes = _number(named, "NNODES", 1)
    if num_nodes == 1:
        return Cluster()
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not named[name]]
    if missing:
        raise ConfigError(
            f"NNODES={num_nodes}, but {' and '.join(missing)} is not set",
            code="train.cluster",
            repair="set NODE_RANK (0 on the first node) and MASTER_ADDR (the first node), or unset NNODES",
        )
    node_rank = _number(named, "NODE_RANK")
    if not 0 <= node_rank < num_nodes:
        raise ConfigError(
            f"NODE_RANK={node_rank} is not below NNODES={num_nodes}",
            code="train.cluster",
            repair=f"use 0 to {num_nodes - 1}",
        )
    return Cluster(num_nodes, node_rank, named["MASTER_ADDR"], _number(named, "MASTER_PORT", DEFAULT_PORT))


def is_stopped(result: Any) -> bool:
    """Say whether an entry's result means that it left early."""
    return result == STOPPED or (isinstance(result, dict) and result.get("status") == STOPPED)


def _use_loopback() -> None:
    """Without this, gloo looks up the name of the machine: slow, or an error, where no network is configured."""
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is not a number", code="train.cluster", repair=f"set {name} to an integer")
    return int(text)
