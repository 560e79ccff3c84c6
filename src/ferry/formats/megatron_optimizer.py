"""Optimizer state of legacy Megatron checkpoints, carried from one layout to another where nothing is ambiguous.

Megatron numbers parameters per rank: group by group (matrices decay, vectors and biases do not), in the order of the
model. Every state tensor has the layout of its parameter, so it becomes a canonical tensor `NAME@exp_avg`,
`NAME@master` and so on, and travels like the weights. What proves the numbering: each group must match the model's
order shape by shape, and each float32 master must round to exactly the parameter it is taken for. Anything else is
refused.

Source: Megatron-LM `optimizer/optimizer.py` (`Float16OptimizerWithFloat16Params`, `FP32Optimizer`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ferry.core.carry import Spec
from ferry.core.errors import LayoutError
from ferry.core.layout import Local, Slot
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.megatron import Rank, arguments, iteration_directory, open_ranks
from ferry.formats.pickles import Fields, Global, Instance, Opaque, Tensor, TensorRef
from ferry.formats.torch_zip import TorchArchive

MASTER = "master"
_CHUNK_ITEMS = 1 << 20


class Group(NamedTuple):
    """A parameter group: its settings, and whether it holds matrices or vectors."""

    settings: dict[str, Any]
    matrices: bool


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer state of a whole checkpoint, in canonical form."""

    slots: tuple[Slot, ...]
    specs: dict[str, Spec]
    groups: tuple[Group, ...]
    kinds: tuple[str, ...]
    """State tensors of each parameter, as `exp_avg`, `exp_avg_sq`."""
    scalars: dict[str, tuple[str, tuple[int, ...], bytes]]
    """Per-parameter values that are equal everywhere, as `step`: dtype, shape, bytes."""
    has_masters: bool
    wrapped: bool
    """Whether the torch state lies under the key `optimizer`, as with mixed precision."""
    extras: dict[str, Any]
    """Plain values to be stored again as they are: `opt_param_scheduler`, counters."""
    arguments: dict[str, Any]


def read_optimizer(source: Checkpoint) -> OptimizerState:
    """Return the optimizer state of a legacy checkpoint, or raise LayoutError saying what is ambiguous."""
    iteration = iteration_directory(source.directory)
    if source.layout.get("ep", 1) > 1 or source.model.dims.num_experts:
        raise _refuse(source.directory, "the optimizer of a model with experts is split over several optimizers")
    if any(iteration.glob("mp_rank_*/distrib_optim.pt")):
        raise _refuse(source.directory, "it was saved by the distributed optimizer (distrib_optim.pt)")
    ranks = open_ranks(iteration)
    slots: list[Slot] = []
    specs: dict[str, Spec] = {}
    first: OptimizerState | None = None
    for rank in ranks:
        own = [slot for slot in source.slots if slot.path == rank.archive.path]
        state = _read_rank(rank, own)
        slots += state.slots
        specs |= _specs(state, source)
        if first is None:
            first = state
        elif (state.groups, state.kinds, state.scalars) != (first.groups, first.kinds, first.scalars):
            raise _refuse(rank.archive.path, "its settings or step differ from those of the first rank")
    assert first is not None
    return OptimizerState(
        tuple(slots), specs, first.groups, first.kinds, first.scalars, first.has_masters, first.wrapped,
        _extras(ranks), {key: value for key, value in arguments(ranks[0]).items() if key.startswith("consumed_")},
    )  # fmt: skip


def _refuse(where: Path, why: str) -> LayoutError:
    return LayoutError(
        f"{where}: the optimizer state cannot be carried to another layout: {why}",
        code="layout.optimizer",
        repair="--optimizer leave converts the weights alone; the trainer then starts with --no-load-optim",
    )


def _specs(state: OptimizerState, source: Checkpoint) -> dict[str, Spec]:
    shapes = source.model.canonical()
    names = {piece.name for slot in state.slots for piece in slot.local.pieces}
    specs = {}
    for name in names:
        shape = shapes[name.rpartition("@")[0]]
        specs[name] = Spec("F32", shape[0], shape[1] if len(shape) > 1 else 1)
    return specs


def _read_rank(rank: Rank, own: Sequence[Slot]) -> OptimizerState:
    archive = rank.archive
    stored = archive.structure.get("optimizer")
    if not isinstance(stored, dict):
        raise _refuse(archive.path, "it has no dictionary `optimizer` (several chained optimizers?)")
    wrapped = isinstance(stored.get("optimizer"), dict)
    torch_state = stored["optimizer"] if wrapped else stored
    if not isinstance(torch_state.get("state"), dict) or not isinstance(torch_state.get("param_groups"), list):
        raise _refuse(archive.path, "it has no `state` and `param_groups`")
    unknown = set(stored) - {"optimizer", "fp32_from_fp16_params", "grad_scaler", "state", "param_groups"}
    if unknown:
        raise _refuse(archive.path, f"unknown entries {', '.join(sorted(map(str, unknown)))}")
    masters = stored.get("fp32_from_fp16_params")
    matrices = [slot for slot in own if _is_matrix(slot)]
    vectors = [slot for slot in own if not _is_matrix(slot)]
    slots: list[Slot] = []
    groups: list[Group] = []
    per_parameter: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for number, group in enumerate(torch_state["param_groups"]):
        states = [torch_state["state"].get(index, {}) for index in group["params"]]
        is_matrices = _matches(matrices, states)
        parameters = matrices if is_matrices else vectors
        if not is_matrices and not _matches(vectors, states):
            raise _refuse(archive.path, f"group {number} does not match the order of the model's parameters")
        settings = {key: plain(value, archive.path) for key, value in group.items() if key != "params"}
        groups.append(Group(settings, is_matrices))
        for slot, state in zip(parameters, states, strict=True):
            found, scalars = _state_slots(archive, slot, state)
            slots += found
            per_parameter.append((tuple(kind for kind, value in state.items() if value.shape), scalars))
        if masters is not None:
            slots += _master_slots(archive, parameters, masters[number], number)
    if sorted(group.matrices for group in groups) != [False, True]:
        raise _refuse(archive.path, f"{len(groups)} groups, expected one of matrices and one of vectors")
    if any(item != per_parameter[0] for item in per_parameter):
        raise _refuse(archive.path, "parameters have different kinds of state or different steps")
    kinds, scalars = per_parameter[0]
    return OptimizerState(tuple(slots), {}, tuple(groups), kinds, scalars, masters is not None, wrapped, {}, {})


def _is_matrix(slot: Slot) -> bool:
    return slot.local.ndim > 1 and not slot.label.endswith(".bias")


def _matches(parameters: Sequence[Slot], states: Sequence[Mapping[str, Any]]) -> bool:
    shapes = [tuple(slot.local.shape) for slot in parameters]
    found = [next((value.shape for value in state.values() if _has_shape(value)), None) for state in states]
    return shapes == found


def _has_shape(value: Any) -> bool:
    return isinstance(value, TensorRef) and bool(value.shape)


def _state_slots(
    archive: TorchArchive, slot: Slot, state: Mapping[str, Any]
) -> tuple[list[Slot], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    slots: list[Slot] = []
    scalars: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for kind, value in state.items():
        if not isinstance(value, TensorRef):
            raise _refuse(archive.path, f"state {kind} of {slot.label} is {value!r}, expected a tensor")
        extent = archive.extent(f"{slot.label}@{kind}", value)
        if value.shape:
            if value.shape != slot.local.shape or extent.dtype != "F32":
                raise _refuse(archive.path, f"state {kind} of {slot.label} is {extent.dtype} {list(value.shape)}")
            slots.append(Slot(archive.path, extent.offset, "F32", _renamed(slot.local, kind), f"{slot.label}@{kind}"))
        else:
            with open(archive.path, "rb") as file:
                scalars[kind] = (extent.dtype, (), os.pread(file.fileno(), extent.num_bytes, extent.offset))
    return slots, scalars


def _renamed(local: Local, kind: str) -> Local:
    return local._replace(pieces=tuple(piece._replace(name=f"{piece.name}@{kind}") for piece in local.pieces))


def _master_slots(
    archive: TorchArchive, parameters: Sequence[Slot], masters: Sequence[TensorRef], number: int
) -> Iterator[Slot]:
    if [master.shape for master in masters] != [slot.local.shape for slot in parameters]:
        raise _refuse(archive.path, f"the float32 masters of group {number} do not match its parameters")
    for slot, master in zip(parameters, masters, strict=True):
        extent = archive.extent(f"{slot.label}@{MASTER}", master)
        if extent.dtype != "F32" or not _rounds_to(archive.path, extent.offset, slot):
            raise _refuse(archive.path, f"the float32 master of {slot.label} does not round to its parameter")
        yield Slot(archive.path, extent.offset, "F32", _renamed(slot.local, MASTER), f"{slot.label}@{MASTER}")


def _rounds_to(path: Path, offset: int, slot: Slot) -> bool:
    """Say whether float32 values at `offset` are, rounded to nearest even, exactly the parameter in `slot`."""
    total = slot.local.rows * slot.local.cols
    item = {"BF16": 2, "F16": 2, "F32": 4}.get(slot.dtype, 0)
    with open(path, "rb") as file:
        for start in range(0, total if item else 1, _CHUNK_ITEMS):
            count = min(_CHUNK_ITEMS, total - start)
            values = np.frombuffer(os.pread(file.fileno(), count * 4, offset + start * 4), np.float32)
            stored = os.pread(file.fileno(), count * item, slot.offset + start * item)
            if not item or _rounded(values, slot.dtype) != stored:
                return False
    return True


def _rounded(values: Any, dtype: str) -> bytes:
    if dtype == "F32":
        return bytes(values.tobytes())
    if dtype == "F16":
        return bytes(values.astype(np.float16).tobytes())
    bits = values.view(np.uint32)
    return bytes(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes())


def _extras(ranks: Sequence[Rank]) -> dict[str, Any]:
    """Return the plain training values that are equal on all ranks; refuse those that are not."""
    extras = {}
    for key in ("opt_param_scheduler", "num_floating_point_operations_so_far", "iteration"):
        values = [rank.archive.structure.get(key) for rank in ranks]
        if values[0] is None:
            continue
        if any(value != values[0] for value in values):
            raise _refuse(ranks[0].archive.path, f"{key} differs between ranks")
        extras[key] = plain(values[0], ranks[0].archive.path)
    scaler = ranks[0].archive.structure["optimizer"].get("grad_scaler")
    if scaler is not None:
        extras["grad_scaler"] = plain(scaler, ranks[0].archive.path)
    return extras


def plain(value: Any, where: Path) -> Any:
    """Return a value that can be pickled again; refuse objects whose meaning is unknown."""
    if isinstance(value, Fields):
        return Instance(value.kind, {key: plain(item, where) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: plain(item, where) for key, item in value.items()}
    if isinstance(value, (Opaque, TensorRef)):
        raise _refuse(where, f"it holds {value!r}")
    if isinstance(value, (list, tuple)) and not isinstance(value, Global):
        return type(value)(plain(item, where) for item in value)
    return value


def optimizer_structure(
    state: OptimizerState, own: Sequence[tuple[str, Local, Tensor]]
) -> tuple[dict[str, Any], list[tuple[str, Local, Tensor]], dict[str, bytes]]:
    """Return the `optimizer` dictionary of one target rank, the tensors to be placed, and constant payloads by key.

    `own` are the rank's parameters in the order of the model: (name, local, tensor).
    """
    placed: list[tuple[str, Local, Tensor]] = []
    constants: dict[str, bytes] = {}

    def place(name: str, local: Local, kind: str) -> Tensor:
        tensor = Tensor("F32", local.shape, f"o{len(placed)}")
        placed.append((f"{name}@{kind}", _renamed(local, kind), tensor))
        return tensor

    states: dict[int, dict[str, Any]] = {}
    groups, masters = [], []
    for group in state.groups:
        chosen = [item for item in own if (item[1].ndim > 1 and not item[0].endswith(".bias")) == group.matrices]
        indices = list(range(len(states), len(states) + len(chosen)))
        for index, (name, local, _) in zip(indices, chosen, strict=True):
            states[index] = {kind: place(name, local, kind) for kind in state.kinds}
            for kind, (dtype, shape, data) in state.scalars.items():
                key = f"s{len(constants)}"
                states[index][kind] = Tensor(dtype, shape, key)
                constants[key] = data
        groups.append({**group.settings, "params": indices})
        if state.has_masters:
            masters.append([place(name, local, MASTER) for name, local, _ in chosen])
    structure: dict[str, Any] = {"state": states, "param_groups": groups}
    if state.wrapped:
        structure = {"optimizer": structure}
        if "grad_scaler" in state.extras:
            structure["grad_scaler"] = state.extras["grad_scaler"]
        if state.has_masters:
            structure["fp32_from_fp16_params"] = masters
    return structure, placed, constants
