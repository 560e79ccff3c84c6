"""How the ranks of a training run are arranged: tensor, pipeline and data parallel, and which arrangements fit a model.

A mesh is four numbers. Ranks are numbered in Megatron's order: tp fastest, then dp, then pp, so the ranks that talk
most sit on one node. `check_mesh` refuses what a model, a number of devices or a batch cannot have, in one line that
names the legal values; what it lets through can be built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ferry.core.errors import ConfigError, LayoutError
from ferry.core.family import Dims
from ferry.core.pipeline import pipeline


class Place(NamedTuple):
    """Where a rank stands in the mesh."""

    pp: int
    dp: int
    tp: int


class Mesh(NamedTuple):
    """The sizes of the axes. `vpp` is the number of virtual stages a rank holds; it adds no ranks."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> Place:
        """Return the coordinates of a rank."""
        assert 0 <= rank < self.num_ranks, f"rank {rank} of {self.num_ranks}"
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Place(pp, dp, tp)

    def rank(self, place: Place) -> int:
        """Return the rank at some coordinates."""
        return (place.pp * self.dp + place.dp) * self.tp + place.tp

    def groups(self, axis: str) -> list[list[int]]:
        """Return the ranks that differ only along `axis` ("tp", "pp" or "dp"), a list for each group."""
        found: dict[Place, list[int]] = {}
        for rank in range(self.num_ranks):
            place = self.place(rank)
            found.setdefault(place._replace(**{axis: 0}), []).append(rank)
        return list(found.values())

    def __str__(self) -> str:
        virtual = f" vpp={self.vpp}" if self.vpp > 1 else ""
        return f"tp={self.tp} pp={self.pp}{virtual} dp={self.dp}"


def plan_mesh(devices: int, tp: int = 1, pp: int = 1, vpp: int = 1) -> Mesh:
    """Return the mesh that gives the devices which tp and pp leave to dp."""
    if devices % (tp * pp):
        raise LayoutError(
            f"tp*pp={tp * pp} (tp={tp} pp={pp}) does not divide {devices} devices",
            code="mesh.devices",
            repair=f"use tp*pp of {_either(_divisors(devices))}, or a multiple of {tp * pp} devices",
        )
    return Mesh(tp, pp, vpp, devices // (tp * pp))


def check_mesh(
    dims: Dims,
    mesh: Mesh,
    *,
    model: str = "the model",
    devices: int | None = None,
    micro_batch: int = 1,
    global_batch: int | None = None,
    seq_len: int | None = None,
    max_positions: int | None = None,
    layer_list: tuple[int, ...] = (),
) -> None:
    """Raise LayoutError or ConfigError, in one line, for the first thing that does not fit together."""
    if devices is not None and mesh.num_ranks != devices:
        fitting = plan_mesh(devices, mesh.tp, mesh.pp, mesh.vpp)
        raise LayoutError(
            f"tp*pp*dp={mesh.num_ranks} ({mesh}), found {devices} devices",
            code="mesh.devices",
            repair=f"use dp={fitting.dp}",
        )
    _check_tp(dims, mesh.tp, model)
    _check_pp(dims, mesh, model, layer_list)
    _check_batch(mesh, micro_batch, global_batch)
    if seq_len is not None and max_positions is not None and seq_len > max_positions:
        raise ConfigError(
            f"seq_len={seq_len} is longer than max_positions={max_positions} of {model}",
            code="mesh.seq-len",
            repair=f"use at most {max_positions}, or raise the limit in the model's config.json",
        )


def trainable_tp(dims: Dims) -> list[int]:
    """Return every tensor-parallel size a model can be trained with. Fewer kv heads than tp are replicated."""
    return [tp for tp in _divisors(dims.num_heads) if not _tp_problem(dims, tp)]


def even_pp(dims: Dims) -> list[int]:
    """Return every pipeline size that splits the layers evenly."""
    return _divisors(dims.num_layers)


def padded_rows(vocab_size: int, tp: int) -> int:
    """Return the rows of the vocabulary on one rank; the last ranks may hold padding."""
    return -(-vocab_size // tp)


def kv_heads_per_rank(dims: Dims, tp: int) -> int:
    """Return how many key-value heads a rank holds: at least one, a copy where tp is larger than their number."""
    return max(dims.num_groups // tp, 1)


def _tp_problem(dims: Dims, tp: int) -> str:
    """Return what tp does not divide, or an empty string."""
    sizes = {"num_heads": dims.num_heads}
    if not dims.num_experts or dims.dense_layers:
        sizes["ffn_hidden_size"] = dims.ffn_hidden_size
    if dims.num_experts:
        sizes["expert_ffn_hidden_size"] = dims.expert_ffn_hidden_size
    for name, size in sizes.items():
        if size % tp:
            return f"does not divide {name}={size}"
    if tp <= dims.num_groups and dims.num_groups % tp:
        return f"does not divide num_kv_heads={dims.num_groups}"
    if tp > dims.num_groups and tp % dims.num_groups:
        return f"is no multiple of num_kv_heads={dims.num_groups}"
    return ""


def _check_tp(dims: Dims, tp: int, model: str) -> None:
    problem = _tp_problem(dims, tp)
    if problem:
        raise LayoutError(f"tp={tp} {problem} ({model})", code="mesh.tp", repair=f"use {_either(trainable_tp(dims))}")


def _check_pp(dims: Dims, mesh: Mesh, model: str, layer_list: tuple[int, ...]) -> None:
    blocks = mesh.pp * mesh.vpp
    legal = even_pp(dims)
    if mesh.vpp > 1 and mesh.pp == 1:
        raise LayoutError(
            f"vpp={mesh.vpp} needs pp of 2 or more, found pp=1", code="mesh.vpp", repair="use vpp=1, or raise pp"
        )
    if not layer_list and dims.num_layers % blocks:
        what = f"pp={mesh.pp}" if mesh.vpp == 1 else f"pp*vpp={blocks}"
        verb = "is more than" if blocks > dims.num_layers else "does not divide"
        raise LayoutError(
            f"{what} {verb} num_layers={dims.num_layers} ({model})", code="mesh.pp", repair=f"use {_either(legal)}"
        )
    pipeline(dims.num_layers, mesh.pp, mesh.vpp, layer_list)  # refuses a layer_list that does not add up


def _check_batch(mesh: Mesh, micro_batch: int, global_batch: int | None) -> None:
    if global_batch is None:
        return
    step = micro_batch * mesh.dp
    if global_batch % step:
        below, above = global_batch // step * step, -(-global_batch // step) * step
        raise ConfigError(
            f"global_batch={global_batch} is no multiple of micro_batch*dp={step} ({micro_batch}*{mesh.dp})",
            code="mesh.batch",
            repair=f"use {_either([size for size in (below, above) if size])}",
        )
    if mesh.vpp > 1 and global_batch // step % mesh.pp:
        raise ConfigError(
            f"vpp={mesh.vpp} needs a multiple of pp={mesh.pp} micro batches a step, found {global_batch // step}",
            code="mesh.batch",
            repair=f"use a global batch that is a multiple of {step * mesh.pp}, or vpp=1",
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _either(values: Iterable[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
