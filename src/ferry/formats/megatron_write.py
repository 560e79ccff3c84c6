"""A legacy Megatron checkpoint, planned: every file, every offset, every key, before the first byte is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ferry.core.carry import Spec, TargetFile
from ferry.core.errors import InputError
from ferry.core.family import EMBEDDING, Model
from ferry.core.layout import Local, Slot
from ferry.core.pipeline import Chunk, pipeline
from ferry.formats.checkpoint import Checkpoint, Draft
from ferry.formats.hf_assets import pack_assets
from ferry.formats.megatron import TRACKER, WEIGHTS, layout_facts
from ferry.formats.megatron_args import build_args
from ferry.formats.megatron_names import MegatronLayout, rank_tensors
from ferry.formats.megatron_optimizer import OptimizerState, optimizer_structure
from ferry.formats.pickles import Tensor
from ferry.formats.torch_zip import ZipPlan, plan_zip

CHECKPOINT_VERSION = 3.0


def rank_name(layout: MegatronLayout, tp: int, pp: int, ep: int) -> str:
    """Return a rank's directory name: the pipeline and expert numbers appear only where there are several."""
    name = f"mp_rank_{tp:02d}"
    name += f"_{pp:03d}" if layout.pp > 1 else ""
    return name + (f"_{ep:03d}" if layout.ep > 1 else "")


def draft_megatron(
    source: Checkpoint,
    layout: MegatronLayout,
    directory: Path,
    iteration: str,
    divisible_by: int,
    optimizer: OptimizerState | None = None,
) -> Draft:
    """Plan all ranks of a layout below `directory`. `iteration` is `release` or `iter_%07d`."""
    model, specs = source.model, source.specs()
    chunks = pipeline(model.dims.num_layers, layout.pp, layout.vpp, layout.layer_list, layout.noop_layers)
    number = 0 if iteration == "release" else int(iteration.removeprefix("iter_"))
    dtype = next(iter(specs.values())).dtype
    base = {
        "args": build_args(model, layout, dtype, divisible_by),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": number,
    }
    if optimizer is not None:
        base["args"].state.update(optimizer.arguments)  # type: ignore[attr-defined]
        base |= {key: value for key, value in optimizer.extras.items() if key != "grad_scaler"}
    files = []
    for stage in range(layout.pp):
        own = [chunk for chunk in chunks if chunk.stage == stage]
        for ep in range(layout.ep):
            for tp in range(layout.tp):
                path = directory / iteration / rank_name(layout, tp, stage, ep) / WEIGHTS
                files.append(_rank_file(model, layout, own, (tp, ep), specs, base, path, optimizer))
    return Draft(
        format="megatron",
        files=tuple(files),
        small=pack_assets(source.assets, source.frames, source.carried),
        layout=layout_facts(layout)
        | {
            "iteration": iteration,
            "make_vocab_size_divisible_by": divisible_by,
            "vocab_size": model.dims.vocab_size,
            "pad_rows": "zeros",
        },
        last={TRACKER: (iteration if iteration == "release" else str(number)).encode()},
    )


def _rank_file(
    model: Model,
    layout: MegatronLayout,
    chunks: list[Chunk],
    rank: tuple[int, int],
    specs: dict[str, Spec],
    base: dict[str, Any],
    path: Path,
    optimizer: OptimizerState | None,
) -> TargetFile:
    structure: dict[str, Any] = dict(base)
    placed: list[tuple[str, Local, Tensor]] = []
    constants: dict[str, bytes] = {}
    for chunk in sorted(chunks, key=lambda chunk: chunk.virtual):
        flat: dict[str, Tensor] = {}
        for name, local in rank_tensors(model, layout, chunk, *rank).items():
            tensor = Tensor(stored_dtype(name, local, specs, model), local.shape, str(len(placed)))
            flat[name] = tensor
            placed.append((name, local, tensor))
        key = "model" if layout.vpp == 1 else f"model{chunk.virtual}"
        structure[key] = _nest(flat) if layout.names == "classic" else flat
    if optimizer is not None:
        structure["optimizer"], states, constants = optimizer_structure(optimizer, placed)
        placed += states
    plan = plan_zip(structure, name=WEIGHTS.removesuffix(".pt"), constants=constants)
    slots = tuple(
        Slot(path, plan.payload_offset(tensor.key), tensor.dtype, local, name) for name, local, tensor in placed
    )
    return TargetFile(path, plan.num_bytes, slots, plan.begin, _finisher(plan, [item.key for _, _, item in placed]))


def _finisher(plan: ZipPlan, keys: list[str]) -> Callable[[int, list[int]], None]:
    return lambda fd, crcs: plan.finish(fd, dict(zip(keys, crcs, strict=True)))


def stored_dtype(stored: str, local: Local, specs: dict[str, Spec], model: Model) -> str:
    """Return the one dtype of a stored tensor; a rank that holds only padding takes the embedding's."""
    names = [piece.name for piece in local.pieces] or [model.part(EMBEDDING).name]
    dtype = specs[names[0]].dtype
    other = next((name for name in names if specs[name].dtype != dtype), None)
    if other is not None:
        raise InputError(
            f"{names[0]} is {dtype} and {other} is {specs[other].dtype}; Megatron stores them in one tensor ({stored})",
            code="megatron.mixed-dtype",
            repair="save the model in one dtype first: Ferry never casts",
        )
    return dtype


def _nest(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Return the nested dictionaries that the classic dialect wants from names with "/"."""
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = tensor
    return nested
