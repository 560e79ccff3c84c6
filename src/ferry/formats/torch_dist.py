"""Megatron's distributed checkpoints (`torch_dist`), opened whatever layout wrote them, without torch.

    DIR/latest_checkpointed_iteration.txt   the iteration, or the word release
    DIR/iter_0000001/metadata.json          says that this is a distributed checkpoint
                     .metadata              a pickle: key -> size and chunks; chunk -> file, offset, length
                     common.pt              args, iteration: what is the same on every rank
                     __R_K.distcp           torch archives one after another, one a chunk

A key names a tensor of the whole model: what a single rank would hold, stacked over layers and experts. A chunk is a
rectangle of it, so placing rectangles is all there is to reading. Measured facts: docs/design/torch-dist-format.md.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.dtypes import ITEM_BYTES
from ferry.core.errors import InputError
from ferry.core.family import Model
from ferry.core.layout import Local, Slot
from ferry.core.pipeline import pipeline
from ferry.families.registry import model_of, read_config
from ferry.formats.checkpoint import Checkpoint
from ferry.formats.hf_assets import read_assets, tied_copies
from ferry.formats.megatron import TRACKER, TRAINING_KEYS, layout_facts
from ferry.formats.megatron_names import MegatronLayout, rank_tensors
from ferry.formats.pickles import TensorRef, read_pickle
from ferry.formats.torch_zip import TorchArchive, open_torch

METADATA, METADATA_JSON, COMMON = ".metadata", "metadata.json", "common.pt"
LAYERS = "decoder.layers."
EXPERTS = "mlp.experts.experts."
LOCAL_NORM = "mlp.linear_fc1.layer_norm_weight"
"""What megatron-core's local layers call the norm before experts; Transformer Engine's say pre_mlp_layernorm.weight."""
_FIELDS = frozenset(
    f"torch.distributed.checkpoint.{name}"
    for name in (
        "metadata.Metadata", "metadata.TensorStorageMetadata", "metadata.ChunkStorageMetadata",
        "metadata.MetadataIndex", "filesystem._StorageInfo",
    )
)  # fmt: skip
_TRAINING = re.compile(r"(?:chained_\d+\.)?(optimizer)\.|(rng_state|rerun_state_machine_state)\b")

Shape = tuple[int, ...]


class Address(NamedTuple):
    """A tensor of the model: its name inside its layer (Transformer Engine's dialect), its layer and its expert."""

    name: str
    layer: int = -1
    expert: int = -1


class _Key(NamedTuple):
    """A key taken apart. `axes` are its stacking dimensions, outermost first; `half` is 0 or 1 for gate or up alone."""

    address: Address
    axes: tuple[str, ...]
    half: int | None = None


class _Chunk(NamedTuple):
    """A stored rectangle: its place in the global tensor, and its archive in a file."""

    offsets: Shape
    sizes: Shape
    path: Path
    offset: int
    num_bytes: int


def is_torch_dist(directory: Path) -> bool:
    """Say whether a directory (or the iteration its tracker names) is a distributed checkpoint."""
    try:
        return bool(_iteration(directory))
    except InputError:
        return False


def open_torch_dist(directory: Path, hf_directory: Path | None = None) -> Checkpoint:
    """Open a distributed checkpoint: headers only. `hf_directory` has the config where there is no `hf_assets`."""
    iteration = _iteration(directory)
    top = iteration.parent if (iteration.parent / TRACKER).is_file() else iteration
    kept = read_assets(top, hf_directory)
    model = model_of(read_config(kept.assets.files["config.json"]), str(kept.assets.files["config.json"]))
    common = open_torch(iteration / COMMON).structure
    if not isinstance(common, dict):
        raise InputError(f"{iteration / COMMON} holds no dictionary", code="torch-dist.common")
    args = common["args"] if isinstance(common.get("args"), dict) else {}
    if args.get("noop_layers"):
        raise InputError(f"{iteration} was trained with noop layers", code="torch-dist.noop")
    tensors, training = _read_metadata(iteration)
    training |= {key for key in TRAINING_KEYS if key in common}
    slots, layout = _account(model, tensors, iteration)
    sizes = {
        field: args[name]
        for field, name in (
            ("tp", "tensor_model_parallel_size"), ("pp", "pipeline_model_parallel_size"),
            ("ep", "expert_model_parallel_size"),
        )
        if isinstance(args.get(name), int)
    }  # fmt: skip
    facts = layout_facts(layout) | sizes
    return Checkpoint(
        directory=top,
        format="torch_dist",
        model=model,
        slots=tuple(slots),
        assets=kept.assets,
        layout=facts
        | {
            "iteration": iteration.name,
            "make_vocab_size_divisible_by": args.get("make_vocab_size_divisible_by"),
            "training_state": sorted(training),
        },
        frames=kept.frames,
        carried=kept.carried,
        tied_copies=tied_copies(model, kept.frames),
    )


def archives(directory: Path) -> Iterator[TorchArchive]:
    """Yield the archive of every chunk, training state included: to check their CRCs."""
    iteration = _iteration(directory)
    for _, info in _read_pickle(iteration)["storage_data"].items():
        yield open_torch(_file(iteration, info), base=info["offset"], size=info["length"])


def whole_tensors(model: Model, padded_vocab: int) -> dict[Address, Local]:
    """Return every tensor as a single rank would hold it: what the keys stack and the chunks cut."""
    layout = MegatronLayout(names="te", padded_vocab=padded_vocab)
    (chunk,) = pipeline(model.dims.num_layers, 1)
    return {address_of(name): local for name, local in rank_tensors(model, layout, chunk, 0, 0).items()}


def address_of(name: str) -> Address:
    """Return the address of a tensor from its name on a rank; layer and expert are that rank's own numbers."""
    inside = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not inside:
        return Address(name)
    expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", inside[2])
    if expert:
        return Address(EXPERTS + expert[2], int(inside[1]), int(expert[1]))
    return Address(inside[2], int(inside[1]))


def cropped(local: Local, row: int, col: int, rows: int, cols: int) -> Local:
    """Return a rectangle of a stored tensor as a stored tensor of its own."""
    pieces = []
    for piece in local.pieces:
        assert not piece.transposed
        top, bottom = max(piece.at_row, row), min(piece.at_row + piece.rows, row + rows)
        left, right = max(piece.at_col, col), min(piece.at_col + piece.cols, col + cols)
        if top < bottom and left < right:
            pieces.append(
                piece._replace(
                    row=piece.row + top - piece.at_row, col=piece.col + left - piece.at_col,
                    rows=bottom - top, cols=right - left, at_row=top - row, at_col=left - col,
                )
            )  # fmt: skip
    pad_rows = max(0, row + rows - max(row, local.rows - local.pad_rows))
    return Local(rows, cols, local.ndim, tuple(pieces), pad_rows)


def _iteration(directory: Path) -> Path:
    """Return the directory that holds `metadata.json` and `.metadata`."""
    candidates = [directory]
    tracker = directory / TRACKER
    if tracker.is_file():
        word = tracker.read_text(encoding="utf-8", errors="replace").strip()
        candidates.append(directory / (f"iter_{int(word):07d}" if word.isdigit() else "release"))
    for candidate in candidates:
        description = candidate / METADATA_JSON
        if description.is_file() and (candidate / METADATA).is_file():
            try:
                backend = json.loads(description.read_text(encoding="utf-8")).get("sharded_backend")
            except (ValueError, AttributeError):
                backend = None
            if backend == "torch_dist":
                return candidate
    raise InputError(f"{directory} has no {METADATA_JSON} of a torch_dist checkpoint", code="torch-dist.none")


def _read_pickle(iteration: Path) -> dict[str, Any]:
    document = read_pickle((iteration / METADATA).read_bytes(), str(iteration / METADATA), _FIELDS)
    if not isinstance(document, dict) or not {"state_dict_metadata", "storage_data"} <= document.keys():
        raise InputError(f"{iteration / METADATA} is not a checkpoint's metadata", code="torch-dist.metadata")
    return document


def _read_metadata(iteration: Path) -> tuple[dict[str, tuple[Shape, list[_Chunk]]], set[str]]:
    """Return every weight's global size and chunks by key, and the kinds of training state that are there."""
    document = _read_pickle(iteration)
    stored = {(index["fqn"], index.get("offset")): info for index, info in document["storage_data"].items()}
    tensors: dict[str, tuple[Shape, list[_Chunk]]] = {}
    training: set[str] = set()
    for key, value in document["state_dict_metadata"].items():
        state = _TRAINING.match(key)
        if state:
            training.add(state[1] or state[2])
        elif isinstance(value, dict) and "chunks" in value:
            chunks = []
            for chunk in value["chunks"]:
                info = stored.get((key, chunk["offsets"]))
                if info is None:
                    raise InputError(f"{iteration}: no file has {key} at {chunk['offsets']}", code="torch-dist.cut")
                path = _file(iteration, info)
                chunks.append(_Chunk(chunk["offsets"], chunk["sizes"], path, info["offset"], info["length"]))
            tensors[key] = (value["size"], chunks)
    return tensors, training


def _file(iteration: Path, info: dict[str, Any]) -> Path:
    name = str(info["relative_path"])
    if Path(name).name != name or info.get("transform_descriptors"):
        raise InputError(f"{iteration / METADATA} keeps {name!r} in a way unknown to Ferry", code="torch-dist.storage")
    return iteration / name


def _parse(key: str) -> _Key:
    """Take a key apart: `decoder.layers.N.` and `experts.N.` where each has a key of its own, stacked otherwise."""
    layer = re.fullmatch(r"(?:module\.|model\.)*decoder\.layers\.(?:(\d+)\.)?(.+)", key)
    if not layer:
        return _Key(Address(re.sub(r"^(?:module\.|model\.)+", "", key)), ())
    name, half = layer[2], None
    if name.endswith((".weight_w", ".weight_v")):
        name, half = name[:-2], "wv".index(name[-1])
    expert = re.fullmatch(r"mlp\.experts\.experts\.(?:(\d+)\.)?(.+)", name)
    axes: tuple[str, ...] = () if layer[1] else ("layer",)
    address = Address(name, int(layer[1] or -1))
    if expert:
        axes = axes if expert[1] else (*axes, "expert")
        address = Address(EXPERTS + expert[2], address.layer, int(expert[1] or -1))
    return _Key(address, axes, half)


def _account(
    model: Model, tensors: dict[str, tuple[Shape, list[_Chunk]]], iteration: Path
) -> tuple[list[Slot], MegatronLayout]:
    """Return a slot for every chunk; refuse unknown keys, wrong sizes, holes and overlaps."""
    keys = {key: _parse(key) for key in tensors}
    embedding = next((key for key, parsed in keys.items() if parsed.address.name.startswith("embedding.word")), "")
    padded_vocab = tensors[embedding][0][0] if embedding else 0
    wholes = whole_tensors(model, padded_vocab)
    moe_norm = any(address.name == "pre_mlp_layernorm.weight" for address in wholes)
    names = "te" if any(parsed.address.name == "pre_mlp_layernorm.weight" for parsed in keys.values()) else "mcore"
    slots: list[Slot] = []
    covered: dict[Address, int] = defaultdict(int)
    unknown = []
    for key, (size, chunks) in tensors.items():
        parsed = keys[key]
        if moe_norm and parsed.address.name == LOCAL_NORM and parsed.address not in wholes:
            parsed = parsed._replace(address=parsed.address._replace(name="pre_mlp_layernorm.weight"))
        try:
            for chunk in chunks:
                for address, slot in _slots(key, parsed, size, chunk, wholes):
                    slots.append(slot)
                    covered[address] += slot.local.rows * slot.local.cols
        except KeyError:
            unknown.append(key)
    missing = [address for address in wholes if address not in covered]
    partly = [address for address, area in covered.items() if area != wholes[address].rows * wholes[address].cols]
    complaints = [
        f"{len(items)} {word}: {', '.join(map(str, items[:4]))}{' ...' if len(items) > 4 else ''}"
        for word, items in (
            ("unknown", unknown),
            ("missing", [_words(address) for address in missing]),
            ("with holes or overlaps", [_words(address) for address in partly]),
        )
        if items
    ]
    if complaints:
        raise InputError(
            f"{iteration} is not a checkpoint of this {model.family.name} model; tensors {'; '.join(complaints)}",
            code="torch-dist.tensors",
            repair="is hf_assets/config.json the config of this model?",
        )
    return slots, MegatronLayout(names=names, padded_vocab=padded_vocab)


def _words(address: Address) -> str:
    where = f" of layer {address.layer}" if address.layer >= 0 else ""
    return address.name + where + (f", expert {address.expert}" if address.expert >= 0 else "")


def _slots(
    key: str, parsed: _Key, size: Shape, chunk: _Chunk, wholes: dict[Address, Local]
) -> Iterator[tuple[Address, Slot]]:
    """Yield one slot for every layer and expert that a chunk spans. Raises KeyError for a tensor the model lacks."""
    archive = open_torch(chunk.path, base=chunk.offset, size=chunk.num_bytes)
    if not isinstance(archive.structure, TensorRef) or prod(archive.structure.shape) != prod(chunk.sizes):
        raise InputError(
            f"{chunk.path}: the chunk of {key} at {chunk.offsets} is not {chunk.sizes}", code="torch-dist.chunk"
        )
    extent = archive.extent(key, archive.structure)
    depth = len(parsed.axes)
    spans = [range(start, start + count) for start, count in zip(chunk.offsets, chunk.sizes[:depth], strict=False)]
    row, rows = chunk.offsets[depth], chunk.sizes[depth]
    col, cols = (chunk.offsets[depth + 1], chunk.sizes[depth + 1]) if len(size) > depth + 1 else (0, 1)
    for number, index in enumerate(itertools.product(*spans)):
        where = dict(zip(parsed.axes, index, strict=True))
        address = Address(
            parsed.address.name,
            where.get("layer", parsed.address.layer),
            where.get("expert", parsed.address.expert),
        )
        whole = wholes[address]
        halves = 1 if parsed.half is None else 2
        expected = (whole.rows // halves, *whole.shape[1:])
        if size[depth:] != expected:
            raise InputError(f"{key} has size {size}, expected {expected} behind {depth} axes", code="torch-dist.size")
        local = cropped(whole, row + (parsed.half or 0) * expected[0], col, rows, cols)
        offset = extent.offset + number * rows * cols * ITEM_BYTES[extent.dtype]
        yield address, Slot(chunk.path, offset, extent.dtype, local, key)
