"""Saving and resuming a run: a snapshot by each rank, written while the next steps run, made to count by rank 0.

The step that hands over a snapshot is blocked for one copy of what the rank owns. Every rank then writes its own files.
Rank 0 waits for all of them, writes the document that makes the checkpoint count, renames the directory, reads all of
it back, and only then removes the oldest. An error of the writing thread stops the next step.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ferry.core.errors import FerryError, OutputError
from ferry.core.gather import Sources
from ferry.core.layout import Local
from ferry.engines.modules import to_torch
from ferry.formats import training
from ferry.formats.training import Stored, TrainingState
from ferry.verbs.train.engine.groups import Groups
from ferry.verbs.train.engine.optimizer import MOMENTS, Optimizer
from ferry.verbs.train.engine.parameters import Held, sharded_place

POLL_S = 0.02
Note = Callable[..., None]


class Snapshot(NamedTuple):
    """What one rank saves of one step."""

    step: int
    tensors: list[Stored]
    values: dict[str, Any]


class Store:
    """The checkpoints of a run, seen from one rank."""

    def __init__(
        self, directory: Path, groups: Groups, *, sharded: bool, keep: int, asynchronous: bool, attempt: str,
        note: Note, limit_s: float,
    ) -> None:  # fmt: skip
        self._directory, self._groups, self._sharded = directory, groups, sharded
        self._keep, self._asynchronous, self._attempt, self._note, self._limit_s = (
            keep,
            asynchronous,
            attempt,
            note,
            limit_s,
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._good: list[int] = []

    def save(self, step: int, optimizer: Optimizer, values: Mapping[str, Any]) -> None:
        """Take a snapshot of a step (counted from 1) and write it; the last one must have ended well first."""
        self.wait()
        snapshot = Snapshot(step, self._snapshot(optimizer), dict(values))
        if not self._asynchronous:
            self._guarded(snapshot)
            self.check()
            return
        self._thread = threading.Thread(target=self._guarded, args=(snapshot,), name=f"save-{step}")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that went on meanwhile."""
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError):
                raise _unwritable(self._directory, error) from error
            raise error

    def wait(self) -> None:
        """Wait until the last save has ended, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def newest(self) -> TrainingState | None:
        """Return the newest checkpoint whose every digest holds, on all ranks the same; put damaged ones aside.

        Every rank checks its share of the files.
        """
        rank, world = self._groups.rank, self._groups.mesh.num_ranks
        if rank == 0:
            self._clean()
        self._meet()
        for step in training.list_steps(self._directory):
            found, problem = self._verify(self._directory / training.step_name(step), rank, world)
            problems = _all_texts(problem, world)
            if not any(problems) and found is not None:
                # Older ones are not read again; they count, so that they are removed in their turn.
                self._good = [older for older in training.list_steps(self._directory) if older <= step]
                return found
            if rank == 0:
                reason = next(text for text in problems if text)
                self._note("rejected", step=step, reason=reason)
                place = self._directory / training.step_name(step)
                place.rename(place.with_name(f"{place.name}{training.REJECTED}-{self._attempt}"))
            self._meet()
        return None

    def restore(self, state: TrainingState, optimizer: Optimizer) -> None:
        """Load weights and moments into this rank's layout, whatever layout they were saved from."""
        kinds = ("", *MOMENTS)
        opened = {kind: Sources(training.of_kind(state.slots, kind)) for kind in kinds}
        for index, item in enumerate(optimizer.held):
            local = self._local(item)
            values = {}
            for kind, sources in opened.items():
                shape = optimizer.masters[index].shape
                values[kind] = _load(sources, local, tuple(shape))
            optimizer.restore(index, values, int(state.values["num_updates"]))
        for sources in opened.values():
            sources.__exit__()

    def _verify(self, directory: Path, rank: int, world: int) -> tuple[TrainingState | None, str]:
        try:
            return training.verify(directory, rank, world), ""
        except FerryError as error:
            return None, error.message
        except OSError as error:
            return None, str(error)

    def _clean(self) -> None:
        """Remove what a killed run left half-written."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob(f"*{training.PARTIAL}-*"):
            shutil.rmtree(path)

    def _meet(self) -> None:
        if self._groups.mesh.num_ranks > 1:
            dist.barrier()

    def _local(self, item: Held) -> Local:
        groups = self._groups
        return sharded_place(item.place, groups.mesh.dp, groups.dp_rank) if self._sharded else item.place.local

    def _saves(self, item: Held) -> bool:
        """Say whether this rank's copy is the one that is written."""
        return item.place.owned and (self._sharded or self._groups.dp_rank == 0) and item.local.numel() > 0

    def _snapshot(self, optimizer: Optimizer) -> list[Stored]:
        found: list[Stored] = []
        for index, item in enumerate(optimizer.held):
            if not self._saves(item):
                continue
            local = self._local(item)
            for kind, tensor in optimizer.state_of(index).items():
                suffix = f"@{kind}" if kind else ""
                pieces = tuple(piece._replace(name=f"{piece.name}{suffix}") for piece in local.pieces)
                copy = tensor.detach().to("cpu", copy=True).contiguous()
                data = copy.reshape(-1).numpy().data.cast("B")
                found.append(Stored(f"{item.place.name}{suffix}", local._replace(pieces=pieces), "F32", data))
        return found

    def _guarded(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # noqa: BLE001 - carried to `check`, which raises it
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        started_s = time.monotonic()
        name = training.step_name(snapshot.step)
        partial = self._directory / f"{name}{training.PARTIAL}-{self._attempt}"
        partial.mkdir(exist_ok=True)
        num_bytes = training.write_rank(partial, self._groups.rank, snapshot.tensors)
        if self._groups.rank != 0:
            return
        world = self._groups.mesh.num_ranks
        while not training.is_complete(partial, world):
            if time.monotonic() - started_s > self._limit_s:
                raise OutputError(f"other ranks did not write {name} within {self._limit_s:.0f} s", code="train.save")
            time.sleep(POLL_S)
        target = self._directory / name
        training.finish(partial, target, world, snapshot.step, snapshot.values)
        training.verify(target)
        self._good.append(snapshot.step)
        self._note("saved", step=snapshot.step, bytes=num_bytes, seconds=round(time.monotonic() - started_s, 3))
        for step in sorted(self._good)[: -self._keep]:
            self._good.remove(step)
            training.remove(self._directory / training.step_name(step))


def _load(sources: Sources, local: Local, shape: tuple[int, ...]) -> torch.Tensor:
    items, dtype = sources.gather(local)
    return to_torch(items, dtype, shape)


def _all_texts(text: str, world: int) -> list[str]:
    if world == 1:
        return [text]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, text)
    return [str(item) for item in found]


def _unwritable(directory: Path, error: OSError) -> OutputError:
    full = error.errno in (28, 122)
    return OutputError(
        f"cannot write a checkpoint to {directory}: {error.strerror}",
        code="output.disk-full" if full else "output.unwritable",
        repair="free some space there, then run the same command again: it goes on from the last good checkpoint",
    )
