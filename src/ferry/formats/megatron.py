"""Megatron's legacy `torch` checkpoints: opened from anybody's files, planned for any layout.

    DIR/latest_checkpointed_iteration.txt           the iteration, or the word release
    DIR/iter_0000001/mp_rank_TT[_PPP[_EEE]]/model_optim_rng.pt
    DIR/hf_assets/                                  Ferry's: config, tokenizer and all that is not weights

Opening accounts for every tensor of every rank against `rank_tensors`; nothing is guessed from one rank alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.errors import InputError
from ferry.core.family import Model
from ferry.core.layout import Slot
from ferry.core.pipeline import Chunk, pipeline
from ferry.families.registry import model_of, read_config
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.hf_assets import ASSETS, read_assets, tied_copies
from ferry.formats.megatron_names import CLASSIC_SYNONYMS, MegatronLayout, rank_tensors
from ferry.formats.pickles import TensorRef
from ferry.formats.torch_zip import TorchArchive, open_torch

TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS = "model_optim_rng.pt"
TRAINING_KEYS = ("optimizer", "opt_param_scheduler", "lr_scheduler")
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_IGNORED = ("_extra_state", "rotary_pos_emb.inv_freq")


class Rank(NamedTuple):
    """One rank directory: its place in the layout and its opened file."""

    tp: int
    pp: int
    ep: int
    archive: TorchArchive


def is_megatron(directory: Path) -> bool:
    """Say whether a directory (or an iteration inside it) is a legacy Megatron checkpoint."""
    try:
        return any(_rank_directories(iteration_directory(directory)))
    except InputError:
        return False


def iteration_directory(directory: Path) -> Path:
    """Return the directory of the iteration that the tracker names, or the directory itself if it holds ranks."""
    if any(_rank_directories(directory)):
        return directory
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise InputError(f"{directory} has neither {TRACKER} nor mp_rank_* directories", code="megatron.no-tracker")
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word != "release" and not word.isdigit():
        raise InputError(f"{tracker} says {word[:40]!r}, expected a number or 'release'", code="megatron.tracker")
    found = directory / (word if word == "release" else f"iter_{int(word):07d}")
    if not found.is_dir():
        raise InputError(f"{tracker} says {word}, but {found} is not there", code="megatron.no-iteration")
    return found


def _rank_directories(directory: Path) -> Iterator[Path]:
    return (path for path in directory.glob("mp_rank_*") if _RANK.fullmatch(path.name) and path.is_dir())


def open_ranks(directory: Path) -> list[Rank]:
    """Open every rank of an iteration; refuse a set with a rank missing."""
    ranks = []
    for path in sorted(_rank_directories(directory)):
        file = path / WEIGHTS
        if not file.is_file():
            raise InputError(f"{path} has no {WEIGHTS}", code="megatron.no-file")
        first, second, third = (int(text) if text else 0 for text in _RANK.fullmatch(path.name).groups())  # type: ignore[union-attr]
        archive = open_torch(file)
        if not isinstance(archive.structure, dict) or not _model_keys(archive):
            raise InputError(f"{file} holds no model", code="megatron.no-model")
        ranks.append(Rank(first, second, third, archive))
    # With PP=1 and EP>1 the second number is the expert rank: only the args tell.
    args = arguments(ranks[0])
    has_experts = _as_int(args.get("expert_model_parallel_size")) > 1
    if has_experts and _as_int(args.get("pipeline_model_parallel_size")) == 1 and not any(rank.ep for rank in ranks):
        ranks = [Rank(rank.tp, 0, rank.pp, rank.archive) for rank in ranks]
    sizes = [1 + max(getattr(rank, axis) for rank in ranks) for axis in ("tp", "pp", "ep")]
    if len({rank[:3] for rank in ranks}) != sizes[0] * sizes[1] * sizes[2]:
        raise InputError(
            f"{directory} has {len(ranks)} ranks, expected TP{sizes[0]} x PP{sizes[1]} x EP{sizes[2]}",
            code="megatron.missing-rank",
            repair="a rank directory is missing: copy the whole checkpoint",
        )
    return ranks


def _model_keys(archive: TorchArchive) -> list[str]:
    """Return `model`, or `model0`, `model1` ... where pipeline stages are virtual."""
    keys = [key for key in archive.structure if re.fullmatch(r"model\d*", str(key))]
    return ["model"] if "model" in keys else sorted(keys, key=lambda key: int(key[5:]))


def arguments(rank: Rank) -> dict[str, Any]:
    """Return the stored `args` as a dictionary (empty if there are none)."""
    args = rank.archive.structure.get("args")
    return dict(args) if isinstance(args, dict) else {}


def open_megatron(directory: Path, hf_directory: Path | None = None) -> Checkpoint:
    """Open a legacy checkpoint. `hf_directory` has the config and tokenizer where the checkpoint has no `hf_assets`."""
    iteration = iteration_directory(directory)
    top = iteration.parent if directory == iteration and (iteration.parent / TRACKER).is_file() else directory
    kept = read_assets(top, hf_directory)
    model = model_of(read_config(kept.assets.files["config.json"]), str(kept.assets.files["config.json"]))
    ranks = open_ranks(iteration)
    _check_version(ranks[0])
    tensors = {(rank.tp, rank.pp, rank.ep): _chunk_tensors(rank) for rank in ranks}
    layout = _detect_layout(model, ranks, tensors)
    slots: list[Slot] = []
    for rank in ranks:
        for chunk in _chunks(model, layout, rank.pp):
            slots += _account(model, layout, chunk, rank, tensors[rank.tp, rank.pp, rank.ep][chunk.virtual])
    args = arguments(ranks[0])
    return Checkpoint(
        directory=top,
        format="megatron",
        model=model,
        slots=tuple(slots),
        assets=kept.assets,
        layout=layout_facts(layout)
        | {
            "iteration": iteration.name,
            "make_vocab_size_divisible_by": args.get("make_vocab_size_divisible_by"),
            "training_state": sorted({key for rank in ranks for key in TRAINING_KEYS if key in rank.archive.structure}),
        },
        frames=kept.frames,
        carried=kept.carried,
        tied_copies=tied_copies(model, kept.frames),
    )


def layout_facts(layout: MegatronLayout) -> dict[str, Any]:
    """Return a layout as JSON values."""
    facts = {key: getattr(layout, key) for key in layout.__dataclass_fields__}
    return facts | {"layer_list": list(layout.layer_list), "noop_layers": list(layout.noop_layers)}


def _check_version(rank: Rank) -> None:
    version = rank.archive.structure.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version < 2.0:
        raise InputError(
            f"{rank.archive.path} has checkpoint_version {version}, expected 2.0 or later (QKV was ordered otherwise)",
            code="megatron.version",
            repair="load and save it once with a newer Megatron",
        )


def _chunk_tensors(rank: Rank) -> list[dict[str, TensorRef]]:
    """Return the flat name -> tensor dictionary of each virtual stage."""
    return [dict(_flatten(rank.archive.structure[key], "")) for key in _model_keys(rank.archive)]


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, TensorRef]]:
    for key, item in value.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(item, TensorRef):
            for spelling, known in CLASSIC_SYNONYMS.items():
                name = name.replace(spelling, known) if "/" in name else name
            yield name, item
        elif isinstance(item, dict):
            yield from _flatten(item, name)


def _detect_layout(
    model: Model, ranks: list[Rank], tensors: dict[tuple[int, int, int], list[dict[str, TensorRef]]]
) -> MegatronLayout:
    """Return the layout that the files themselves show; `args` tell only what files cannot."""
    args = arguments(ranks[0])
    names = {name for chunks in tensors.values() for chunk in chunks for name in chunk}
    tp, pp, ep = (1 + max(getattr(rank, axis) for rank in ranks) for axis in ("tp", "pp", "ep"))
    first = tensors[0, 0, 0][0]
    embedding = first.get("embedding.word_embeddings.weight") or first.get(
        "language_model/embedding/word_embeddings/weight"
    )
    if embedding is None:
        raise InputError(f"{ranks[0].archive.path} has no word embeddings", code="megatron.tensors")
    layout = MegatronLayout(
        tp=tp,
        pp=pp,
        ep=ep,
        vpp=len(tensors[0, 0, 0]),
        noop_layers=_numbers(args.get("noop_layers")),
        names=_dialect(names),
        experts=_expert_style(names),
        padded_vocab=embedding.shape[0] * tp,
    )
    counts = [len(_layer_numbers(tensors[0, stage, 0][0])) for stage in range(pp)]
    if layout.vpp == 1 and not layout.noop_layers and len(set(counts)) > 1:
        layout = replace(layout, layer_list=tuple(counts))
    elif layout.noop_layers and args.get("num_layer_list"):
        layout = replace(layout, layer_list=_numbers(args["num_layer_list"]))
    return layout


def _numbers(value: Any) -> tuple[int, ...]:
    """Return layer numbers as Megatron's forks keep them: "0,5", a list, a set, or nothing."""
    if isinstance(value, str):
        return tuple(int(text) for text in value.split(",") if text.strip())
    return tuple(sorted(value)) if isinstance(value, (list, tuple, set)) else ()


def _as_int(value: Any) -> int:
    return value if isinstance(value, int) else 1


def _dialect(names: set[str]) -> str:
    if any(name.startswith("language_model/") for name in names):
        return "classic"
    return "te" if any(name.endswith("linear_qkv.layer_norm_weight") for name in names) else "mcore"


def _expert_style(names: set[str]) -> str:
    if any(name.endswith("mlp.experts.weight1") for name in names):
        return "grouped"
    return (
        "te_grouped" if any(re.search(r"mlp\.experts\.linear_fc1\.weight\d", name) for name in names) else "sequential"
    )


def _layer_numbers(names: dict[str, TensorRef]) -> Counter[int]:
    found = (re.search(r"layers\.(\d+)\.", name) for name in names)
    return Counter(int(match.group(1)) for match in found if match)


def _chunks(model: Model, layout: MegatronLayout, stage: int) -> list[Chunk]:
    chunks = pipeline(model.dims.num_layers, layout.pp, layout.vpp, layout.layer_list, layout.noop_layers)
    return sorted((chunk for chunk in chunks if chunk.stage == stage), key=lambda chunk: chunk.virtual)


def _account(
    model: Model, layout: MegatronLayout, chunk: Chunk, rank: Rank, found: dict[str, TensorRef]
) -> Iterator[Slot]:
    """Yield a slot for every tensor of one chunk; refuse missing, unknown and misshapen ones."""
    wanted = rank_tensors(model, layout, chunk, rank.tp, rank.ep)
    found = {name: tensor for name, tensor in found.items() if not name.endswith(_IGNORED)}
    path = rank.archive.path
    shapes = [
        f"{name} {list(found[name].shape)}, expected {list(local.shape)}"
        for name, local in wanted.items()
        if name in found and found[name].shape != local.shape
    ]
    complaints = [
        f"{len(items)} {word}: {', '.join(items[:4])}{' ...' if len(items) > 4 else ''}"
        for word, items in (
            ("missing", [name for name in wanted if name not in found]),
            ("unknown", [name for name in found if name not in wanted]),
            ("of another shape", shapes),
        )
        if items
    ]
    if complaints:
        raise InputError(
            f"{path} is not a rank of this {model.family.name} model at TP{layout.tp} PP{layout.pp}; "
            f"tensors {'; '.join(complaints)}",
            code="megatron.tensors",
            repair=f"is {ASSETS}/config.json the config of this model?",
        )
    for name, local in wanted.items():
        extent = rank.archive.extent(name, found[name])
        yield Slot(path, extent.offset, extent.dtype, local, name)
