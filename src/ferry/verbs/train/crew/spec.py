"""What a crew of workers is asked to do, and how it ended: plain values that pass between processes as JSON.

A crew is one supervisor per node and the workers it forks, one for each local rank. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ferry.core.errors import (
    ConfigError,
    FerryError,
    GateError,
    InputError,
    IntegrityError,
    LayoutError,
    OutputError,
    UnavailableError,
)

Status = Literal["done", "stopped", "failed"]
DEFAULT_PORT = 29400
_BY_EXIT_STATUS: dict[int, type[FerryError]] = {
    error.exit_status: error
    for error in (ConfigError, InputError, LayoutError, IntegrityError, OutputError, UnavailableError, GateError)
}


@dataclass(frozen=True)
class Cluster:
    """The nodes of one run. Node 0 keeps the meeting point at `address`:`port`; with one node there is none."""

    num_nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT


@dataclass(frozen=True)
class CrewSpec:
    """The order a supervisor gets. `payload` is any JSON value and reaches the entry as it is."""

    entry: str
    """`module:function`, called in every worker as `function(seat, payload)`. It returns a JSON value."""
    output: Path
    """The run directory: events.jsonl and logs/ are written there."""
    payload: Any = None
    num_workers: int = 1
    """Workers of this node. All nodes have the same number."""
    preload: tuple[str, ...] = ()
    """Modules the supervisor imports once, before the first fork."""
    restart: bool = True
    max_restarts: int = 10
    """Restarts in a row without a new checkpoint (an event `saved` with a larger step)."""
    same_step_limit: int = 3
    """Failures in a row that got no further than the one before, until the crew gives up."""
    grace_s: float = 60.0
    """From the request to stop until the workers are killed."""
    hang_factor: float = 3.0
    hang_slack_s: float = 10.0
    """A step may last `hang_factor` times the median step, and this much more."""
    quiet_limit_s: float = 1800.0
    """The longest silence while no step time is known, and in every phase but training."""
    join_limit_s: float = 600.0
    """From the start of the first node to the start of the last."""
    contact_limit_s: float = 30.0
    """The longest silence between nodes."""
    cluster: Cluster = field(default_factory=Cluster)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CrewSpec:
        typed = {
            "output": Path(document["output"]),
            "preload": tuple(document["preload"]),
            "cluster": Cluster(**document["cluster"]),
        }
        return cls(**{**document, **typed})


@dataclass(frozen=True)
class Failure:
    """Why a worker, or the crew, did not finish. Without a rank it concerns the whole node."""

    code: str
    message: str
    repair: str = ""
    rank: int | None = None
    step: int = 0
    exit_status: int | None = None
    """The exit status of a mistake the user can mend; none for everything else."""
    type: str = ""
    traceback: str = ""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Failure:
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})

    @property
    def may_pass(self) -> bool:
        """Whether another try can help: a user's mistake stays one."""
        return self.exit_status is None


class Restart(NamedTuple):
    """One restart: which rank failed at which step and why, and how long it took to see it."""

    generation: int
    """The generation that failed."""
    rank: int | None
    step: int
    cause: str
    detected_s: float
    """From the death (or the last progress, for a hang) to the moment it was seen; at most this."""


@dataclass(frozen=True)
class Outcome:
    """How a crew ended. `result` is what the entry returned on the lowest rank of this node."""

    status: Status
    result: Any = None
    failure: Failure | None = None
    restarts: tuple[Restart, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "restarts": [restart._asdict() for restart in self.restarts]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Outcome:
        failure = document["failure"]
        return cls(
            document["status"],
            document["result"],
            Failure.from_json(failure) if failure else None,
            tuple(Restart(**restart) for restart in document["restarts"]),
        )


class CrewDefect(Exception):
    """A worker failed in a way that no user caused. The text holds the worker's own traceback."""


def error_of(failure: Failure) -> Exception:
    """Return a failure as the exception that the command line knows how to print."""
    kind = _BY_EXIT_STATUS.get(failure.exit_status or 0)
    if kind is None and failure.traceback and not failure.code.startswith("train."):
        return CrewDefect(f"{failure.message}\n{failure.traceback}")
    return (kind or UnavailableError)(failure.message, code=failure.code, repair=failure.repair)
