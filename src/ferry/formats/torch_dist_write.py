"""A distributed checkpoint, planned: every chunk, its archive and its place, before the first byte is written.

Chunks are those megatron-core itself would write at the same TP x PP x EP, one file a rank. Any layout loads them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.carry import Spec, TargetFile
from ferry.core.errors import InputError, LayoutError
from ferry.core.family import Model
from ferry.core.layout import Local, Slot
from ferry.core.pipeline import Chunk, pipeline
from ferry.formats.checkpoint import Checkpoint, Draft
from ferry.formats.hf_assets import pack_assets
from ferry.formats.megatron import TRACKER, layout_facts
from ferry.formats.megatron_args import build_args
from ferry.formats.megatron_names import MegatronLayout, rank_tensors
from ferry.formats.megatron_write import CHECKPOINT_VERSION, stored_dtype
from ferry.formats.pickles import DTYPE_TORCH, Call, Global, Instance, Tensor, write_pickle
from ferry.formats.torch_dist import (
    COMMON,
    EXPERTS,
    LAYERS,
    LOCAL_NORM,
    METADATA,
    METADATA_JSON,
    Address,
    address_of,
    cropped,
    whole_tensors,
)
from ferry.formats.torch_zip import ALIGNMENT, ZipPlan, plan_zip

_BACKEND = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
_PROPERTIES = Global("torch.distributed.checkpoint.metadata", "TensorProperties")
_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
"""Modules whose (empty) `_extra_state` Megatron asks for by default; the last one by Transformer Engine only."""


class _Item(NamedTuple):
    """A chunk to be written."""

    key: str
    offsets: tuple[int, ...]
    local: Local
    dtype: str

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1,) * (len(self.offsets) - self.local.ndim) + self.local.shape


@dataclass
class _Catalog:
    """What `.metadata` will say."""

    sizes: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = field(default_factory=dict)


class _Keys:
    """How this model's tensors are called: stacked over layers, or each layer by its number where layers differ."""

    def __init__(self, model: Model, layout: MegatronLayout) -> None:
        self.layers, self.experts = model.dims.num_layers, model.dims.num_experts
        self.stacked = not (model.dims.num_experts and model.dims.dense_layers)
        self.local_norm = layout.names != "te"

    def place(self, address: Address) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Return the key of a tensor, its index in the stacking dimensions, and their sizes."""
        if address.layer < 0:
            return address.name, (), ()
        name = address.name
        if self.local_norm and name == "pre_mlp_layernorm.weight":
            name = LOCAL_NORM
        expert = ((address.expert,), (self.experts,)) if address.expert >= 0 else ((), ())
        if self.stacked:
            return LAYERS + name, (address.layer, *expert[0]), (self.layers, *expert[1])
        return f"{LAYERS}{address.layer}.{name}", *expert

    def state(self, module: str, layer: int, expert: int = -1) -> str:
        """Return the key of a module's `_extra_state`."""
        key, index, sizes = self.place(Address(module, layer, expert))
        numbers = ".".join(map(str, index or (0,))) + "_" + ".".join(map(str, sizes or (1,)))
        return f"{key}._extra_state/shard_{numbers}"


def draft_torch_dist(
    source: Checkpoint, layout: MegatronLayout, directory: Path, iteration: str, divisible_by: int
) -> Draft:
    """Plan a distributed checkpoint below `directory`, cut as this layout would cut it."""
    if layout.noop_layers or layout.vpp > 1:
        raise LayoutError(
            "torch_dist is written without virtual stages and noop layers",
            code="layout.torch-dist",
            repair="leave --vpp and --noop-layers out: any layout can load the result",
        )
    model, specs = source.model, source.specs()
    keys, wholes, catalog = _Keys(model, layout), whole_tensors(model, layout.padded_vocab), _Catalog()
    folder = directory / iteration
    files = []
    for chunk in pipeline(model.dims.num_layers, layout.pp, 1, layout.layer_list):
        for ep in range(layout.ep):
            for tp in range(layout.tp):
                rank = (chunk.stage * layout.ep + ep) * layout.tp + tp
                items = list(_items(model, layout, chunk, (tp, ep), keys, wholes, specs))
                states = list(_states(model, layout, chunk, ep, keys)) if tp == 0 else []
                files.append(_file(folder / f"__{rank}_0.distcp", items, states, catalog))
    number = 0 if iteration == "release" else int(iteration.removeprefix("iter_"))
    args = build_args(model, replace(layout, experts="sequential"), next(iter(specs.values())).dtype, divisible_by)
    args.state.update(ckpt_format="torch_dist")  # type: ignore[union-attr]
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": number}
    return Draft(
        format="torch_dist",
        files=tuple(file for file in files if file is not None),
        small=pack_assets(source.assets, source.frames, source.carried)
        | {f"{iteration}/{COMMON}": archive_bytes(common, COMMON.removesuffix(".pt"))},
        layout=layout_facts(layout)
        | {
            "iteration": iteration,
            "make_vocab_size_divisible_by": divisible_by,
            "vocab_size": model.dims.vocab_size,
            "pad_rows": "zeros",
        },
        last={
            f"{iteration}/{METADATA}": _metadata(catalog),
            f"{iteration}/{METADATA_JSON}": json.dumps(_BACKEND).encode(),
            TRACKER: (iteration if iteration == "release" else str(number)).encode(),
        },
    )


def archive_bytes(structure: Any, name: str) -> bytes:
    """Return a torch archive without storages."""
    plan = plan_zip(structure, name=name)
    with tempfile.TemporaryFile() as file:
        plan.begin(file.fileno())
        plan.finish(file.fileno(), {})
        file.seek(0)
        return file.read()


@lru_cache(maxsize=1)
def _empty_state() -> bytes:
    """Return what megatron-core stores for a module without extra state: a list with None."""
    return archive_bytes([None], "archive")


def _items(
    model: Model,
    layout: MegatronLayout,
    chunk: Chunk,
    rank: tuple[int, int],
    keys: _Keys,
    wholes: dict[Address, Local],
    specs: dict[str, Spec],
) -> Iterator[_Item]:
    """Yield the chunks one rank writes; what ranks share is written by the first of them."""
    tp, ep = rank
    own = model.dims.num_experts // layout.ep if model.dims.num_experts else 0
    names = replace(layout, names="te", experts="sequential")
    for name, local in rank_tensors(model, names, chunk, tp, ep).items():
        address = address_of(name)
        if address.layer >= 0:
            layer = chunk.layers[address.layer]
            assert layer is not None
            address = address._replace(layer=layer)
        if address.expert >= 0:
            address = address._replace(expert=ep * own + address.expert)
        elif ep > 0:
            continue
        if address not in wholes:
            assert model.dims.tied, name  # the last stage's copy of the embedding: the same key, written once
            continue
        key, index, _ = keys.place(address)
        whole = wholes[address]
        for row, col, rows, cols in _rectangles(address.name, whole, local, layout.tp, tp):
            part = cropped(whole, row, col, rows, cols)
            corner = (row,) if whole.ndim == 1 else (row, col)
            yield _Item(key, (*index, *corner), part, stored_dtype(key, whole, specs, model))


def _rectangles(name: str, whole: Local, local: Local, num_ranks: int, rank: int) -> list[tuple[int, int, int, int]]:
    """Return the (row, col, rows, cols) of a whole tensor that a rank writes: gate and up are two."""
    if local.shape == whole.shape and num_ranks > 1:
        return [(0, 0, whole.rows, whole.cols)] if rank == 0 else []
    if name.endswith("linear_fc1.weight"):
        half = local.rows // 2
        return [(start + rank * half, 0, half, whole.cols) for start in (0, whole.rows // 2)]
    if local.cols != whole.cols:
        return [(0, rank * local.cols, whole.rows, local.cols)]
    return [(rank * local.rows, 0, local.rows, whole.cols)]


def _states(model: Model, layout: MegatronLayout, chunk: Chunk, ep: int, keys: _Keys) -> Iterator[str]:
    """Yield the keys of the empty `_extra_state` objects: local layers' and Transformer Engine's together."""
    own = range(0)
    if model.dims.num_experts:
        own = range(ep * model.dims.num_experts // layout.ep, (ep + 1) * model.dims.num_experts // layout.ep)
    for layer in chunk.layers:
        assert layer is not None
        if model.dims.is_moe(layer):
            for linear in ("linear_fc1", "linear_fc2"):
                yield from (keys.state(EXPERTS + linear, layer, expert) for expert in own)
        if ep > 0:
            continue
        modules = [*_STATES]
        modules += ["pre_mlp_layernorm"] if model.dims.is_moe(layer) else ["mlp.linear_fc1", "mlp.linear_fc2"]
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if model.has("query_norm") else []
        yield from (keys.state(module, layer) for module in modules)
    if chunk.last and ep == 0:
        yield "decoder.final_layernorm._extra_state/shard_0_1"


def _file(path: Path, items: list[_Item], states: list[str], catalog: _Catalog) -> TargetFile | None:
    """Plan one file and enter its chunks in the catalog; None where a rank has nothing of its own."""
    position, plans, slots = 0, [], []
    blobs: list[int] = []
    for key in states:
        catalog.objects.append(key)
        catalog.places[key, None] = (path.name, position, len(_empty_state()))
        blobs.append(position)
        position += len(_empty_state())
    for item in items:
        position += -position % ALIGNMENT
        plan = plan_zip(Tensor(item.dtype, item.sizes, "0"), name="archive", base=position)
        plans.append(plan)
        slots.append(Slot(path, plan.payload_offset("0"), item.dtype, item.local, item.key))
        catalog.chunks.setdefault(item.key, []).append((item.offsets, item.sizes))
        catalog.places[item.key, item.offsets] = (path.name, position, plan.num_bytes)
        dtype, size = catalog.sizes.get(item.key, (item.dtype, item.sizes))
        if dtype != item.dtype:
            raise InputError(
                f"{item.key} is {dtype} in one layer and {item.dtype} in another; torch_dist stacks them in one tensor",
                code="torch-dist.mixed-dtype",
                repair="use --format torch, or save the model in one dtype first: Ferry never casts",
            )
        corner = tuple(map(sum, zip(item.offsets, item.sizes, strict=True)))
        catalog.sizes[item.key] = dtype, tuple(map(max, zip(size, corner, strict=True)))
        position += plan.num_bytes
    if not position:
        return None
    return TargetFile(path, position, tuple(slots), _beginner(plans, blobs), _finisher(plans))


def _beginner(plans: list[ZipPlan], blobs: list[int]) -> Callable[[int], None]:
    def begin(fd: int) -> None:
        for offset in blobs:
            os.pwrite(fd, _empty_state(), offset)
        for plan in plans:
            plan.begin(fd)

    return begin


def _finisher(plans: list[ZipPlan]) -> Callable[[int, list[int]], None]:
    def finish(fd: int, crcs: list[int]) -> None:
        for plan, crc in zip(plans, crcs, strict=True):
            plan.finish(fd, {"0": crc})

    return finish


class _Record(Instance):
    """An instance that can be the key of a dictionary."""

    def __hash__(self) -> int:
        return id(self)


def _metadata(catalog: _Catalog) -> bytes:
    """Return the pickle of torch's `Metadata`."""

    def record(name: str, module: str = "metadata", **fields: Any) -> _Record:
        return _Record(Global(f"torch.distributed.checkpoint.{module}", name), fields)

    def size(numbers: tuple[int, ...]) -> Call:
        return Call(Global("torch", "Size"), (numbers,))

    states: dict[str, Any] = {}
    for key, (dtype, whole) in catalog.sizes.items():
        states[key] = record(
            "TensorStorageMetadata",
            properties=Call(_PROPERTIES, (Global("torch", DTYPE_TORCH[dtype]),)),
            size=size(whole),
            chunks=[
                record("ChunkStorageMetadata", offsets=size(offsets), sizes=size(sizes))
                for offsets, sizes in catalog.chunks[key]
            ],
        )
    states |= {key: record("BytesStorageMetadata") for key in catalog.objects}
    places = {
        record("MetadataIndex", fqn=key, offset=None if offsets is None else size(offsets), index=None): record(
            "_StorageInfo", "filesystem", relative_path=file, offset=offset, length=length
        )
        for (key, offsets), (file, offset, length) in catalog.places.items()
    }
    return write_pickle(record("Metadata", state_dict_metadata=states, planner_data=None, storage_data=places))
