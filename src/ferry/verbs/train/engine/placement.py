"""Which rectangle of which canonical tensor each parameter of a rank holds: the one description of a training layout.

Loading, LoRA shapes, gradient sums, clipping, checkpoints and export all follow this table, so a layout is described
once. Parameters have the names of the Hugging Face modules; what they hold is said in canonical tensors (docs/design/
0005-training.md). Splits are Megatron's: query, key, value, gate and up by rows, attention output and down by columns,
embedding and head by (padded) rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from ferry.core import family as f
from ferry.core import layout as cut
from ferry.core.family import Model, Packed
from ferry.core.layout import Local, Part, Piece
from ferry.core.pipeline import Chunk

Sync = Literal["", "tp", "kv"]
"""Over which group the gradient of a replicated parameter is summed: it is complete, or partial on each rank."""

ROWS = (f.GATE, f.UP)
QUERIES = (f.QUERY, f.QUERY_BIAS)
KEYS = (f.KEY, f.VALUE, f.KEY_BIAS, f.VALUE_BIAS)
COLUMNS = (f.ATTENTION_OUT, f.DOWN)
PARTIAL_NORMS = (f.QUERY_NORM, f.KEY_NORM)


class Rank(NamedTuple):
    """A tensor-parallel rank and the number of them."""

    tp: int
    tp_rank: int


class Place(NamedTuple):
    """One parameter on one rank.

    `split` says how it is cut: whole, rows, columns, vocabulary. `sync` is the group its gradient is summed over.
    `owned` is true on the one rank (of those with equal copies) that saves it and counts it in norms.
    """

    name: str
    local: Local
    split: Literal["whole", "rows", "columns", "vocabulary"]
    sync: Sync = ""
    owned: bool = True


def kv_replicas(model: Model, tp: int) -> int:
    """Return how many neighbouring ranks share one key-value head (1 where there are enough heads)."""
    return max(1, tp // model.dims.num_groups)


def places(model: Model, rank: Rank, chunk: Chunk) -> dict[str, Place]:
    """Return every parameter of one pipeline chunk on one tensor-parallel rank, by module parameter name."""
    found: dict[str, Place] = {}
    if chunk.first:
        found |= _vocabulary(model, f.EMBEDDING, rank)
    for layer in chunk.layers:
        if layer is not None:
            found |= {place.name: place for place in _layer(model, rank, layer)}
    if chunk.last:
        norm = model.part(f.FINAL_NORM)
        found[norm.name] = Place(norm.name, cut.whole(norm), "whole", owned=rank.tp_rank == 0)
        if model.has(f.HEAD):
            found |= _vocabulary(model, f.HEAD, rank)
        elif not chunk.first:
            # A tied model keeps a second copy of its embedding on the last stage: the first stage owns it.
            tied = _vocabulary(model, f.EMBEDDING, rank)
            found |= {name: place._replace(owned=False) for name, place in tied.items()}
    return found


def _vocabulary(model: Model, role: str, rank: Rank) -> dict[str, Place]:
    part = model.part(role)
    padded = cut.padded_vocabulary(model.dims.vocab_size, 1, rank.tp)
    local = cut.vocabulary(part, padded, rank.tp, rank.tp_rank)
    return {part.name: Place(part.name, local, "vocabulary")}


def _layer(model: Model, rank: Rank, layer: int) -> Iterator[Place]:
    if model.dims.is_moe(layer):
        yield from _experts(model, rank, layer)
    done: set[str] = set()
    for role in model.layer_roles(layer):
        if role in f.EXPERT_ROLES or role == f.ROUTER:
            continue
        where = model.roles[role]
        if isinstance(where, Packed):
            if where.name not in done:
                done.add(where.name)
                yield _packed(model, rank, layer, where)
            continue
        yield _single(model, rank, layer, role)


def _single(model: Model, rank: Rank, layer: int, role: str) -> Place:
    part = model.part(role, layer)
    if role in COLUMNS:
        return Place(part.name, cut.columns(part, rank.tp, rank.tp_rank), "columns")
    if role in ROWS or role in QUERIES:
        return Place(part.name, cut.stacked([part], rank.tp, rank.tp_rank), "rows")
    if role in KEYS:
        local, owned = _heads(model, rank, part)
        return Place(part.name, local, "rows", "kv" if kv_replicas(model, rank.tp) > 1 else "", owned)
    sync: Sync = "tp" if role in PARTIAL_NORMS and rank.tp > 1 else ""
    return Place(part.name, cut.whole(part), "whole", sync, rank.tp_rank == 0)


def _heads(model: Model, rank: Rank, part: Part) -> tuple[Local, bool]:
    """Return this rank's key-value heads of a part, and whether this rank is the first of those that hold them."""
    replicas = kv_replicas(model, rank.tp)
    owners = rank.tp // replicas
    return cut.stacked([part], owners, rank.tp_rank // replicas), rank.tp_rank % replicas == 0


def _packed(model: Model, rank: Rank, layer: int, where: Packed) -> Place:
    """Return a packed tensor: each role's own cut, below each other."""
    parts = [model.part(role, layer) for role in where.order]
    if any(role in KEYS for role in where.order) and kv_replicas(model, rank.tp) > 1:
        # Bands of one tensor would need different gradient sums: every such family has as many groups as heads.
        raise AssertionError(f"{where.name}: fewer key-value heads than tp in a packed tensor")
    return Place(parts[0].name, cut.stacked(parts, rank.tp, rank.tp_rank), "rows")


def _experts(model: Model, rank: Rank, layer: int) -> Iterator[Place]:
    """Return the router, and all experts of a layer in the two fused tensors that transformers keeps them in."""
    modules = model.family.modules
    sync: Sync = "tp" if rank.tp > 1 else ""
    router = model.part(f.ROUTER, layer)
    yield Place(modules[f.ROUTER].format(layer=layer), cut.whole(router), "whole", sync, owned=rank.tp_rank == 0)
    experts = range(model.dims.num_experts)
    gate_up, down = [], []
    for expert in experts:
        pair = [model.part(f.EXPERT_GATE, layer, expert), model.part(f.EXPERT_UP, layer, expert)]
        gate_up.append(cut.stacked(pair, rank.tp, rank.tp_rank))
        down.append(cut.columns(model.part(f.EXPERT_DOWN, layer, expert), rank.tp, rank.tp_rank))
    for key, locals_, split in ((f.EXPERT_UP, gate_up, "rows"), (f.EXPERT_DOWN, down, "columns")):
        shape = (len(locals_), locals_[0].rows, locals_[0].cols)
        whole = cut.declared(cut.below_each_other(locals_), shape)
        yield Place(modules[key].format(layer=layer), whole, split)  # type: ignore[arg-type]


def adapter_places(base: Place, module: str, rank: Rank, num_ranks: int, in_cols: int) -> tuple[Place, Place]:
    """Return the places of LoRA's A [num_ranks, in] and B [out, num_ranks] for a linear with this base weight.

    Where the base is cut by rows, B is cut like it and A is whole; by columns, A is cut like it and B is whole. The
    gradient of the whole one is partial on each tensor-parallel rank.
    """
    name_a, name_b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    first = rank.tp_rank == 0
    whole_a = cut.whole(Part(name_a, 0, num_ranks, in_cols))
    if base.split == "rows":
        pieces = tuple(Piece(name_b, p.row, 0, p.rows, num_ranks, p.at_row) for p in base.local.pieces)
        b_local = Local(base.local.rows, num_ranks, 2, pieces)
        b = Place(name_b, b_local, "rows", base.sync, base.owned)
        return Place(name_a, whole_a, "whole", "tp", first), b
    whole_b = cut.whole(Part(name_b, 0, base.local.rows, num_ranks))
    if base.split == "columns":
        piece = base.local.pieces[0]
        a_local = Local(num_ranks, piece.cols, 2, (Piece(name_a, 0, piece.col, num_ranks, piece.cols, 0),))
        return Place(name_a, a_local, "columns"), Place(name_b, whole_b, "whole", "tp", first)
    return Place(name_a, whole_a, "whole", "", first), Place(name_b, whole_b, "whole", "", first)


def cut_rows(local: Local, start: int, end: int) -> Local:
    """Return rows `start` to `end` of a stored tensor: what one data-parallel rank holds of it under FSDP."""
    pieces = []
    for piece in local.pieces:
        top, bottom = max(start, piece.at_row), min(end, piece.at_row + piece.rows)
        if top < bottom:
            pieces.append(piece._replace(row=piece.row + top - piece.at_row, rows=bottom - top, at_row=top - start))
    covered = {row for piece in pieces for row in (piece.at_row, piece.at_row + piece.rows)}
    pad = (end - start) - max(covered, default=0)
    return Local(end - start, local.cols, local.ndim, tuple(pieces), max(0, pad))
