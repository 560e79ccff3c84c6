"""What a verb would do, before it does anything: printable, hashable, and the place where refusals happen."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class PlannedFile(NamedTuple):
    """A file that would be written: its path below the output, and its size in bytes."""

    path: str
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """One verb's intention.

    `inputs` maps a label to the content id of what is read (or its path where there is none), so that `identity`
    changes when an input changes. `choices` are the decisions made automatically, each with its reason.
    """

    verb: str
    summary: str
    inputs: dict[str, str]
    output: str = ""
    files: tuple[PlannedFile, ...] = ()
    read_bytes: int = 0
    write_bytes: int = 0
    memory_bytes: int = 0
    choices: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Return a sha256 that is equal for two plans that would do the same to the same inputs."""
        same: dict[str, Any] = {"verb": self.verb, "inputs": self.inputs, "details": self.details}
        same["files"] = [list(file) for file in self.files]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "files": [file._asdict() for file in self.files], "identity": self.identity}
