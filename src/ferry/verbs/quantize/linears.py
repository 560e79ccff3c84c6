"""The linear layers of a model that are quantized, by kind: what their weights measure and how serving cuts them.

Embedding, head and router stay float. A linear is a module of the checkpoint: where a family packs query, key and value
into one tensor, that tensor is one linear. On disk each expert has its own.
"""

from __future__ import annotations

from typing import NamedTuple

from ferry.core.family import ATTENTION_OUT, DOWN, EXPERT_DOWN, EXPERT_ROLES, KEY, VALUE, Model
from ferry.formats.quantized import LINEAR_ROLES

CUT_BY_COLUMN = (ATTENTION_OUT, DOWN, EXPERT_DOWN)
"""Roles whose rows are cut by tensor parallelism: each rank has a part of every row."""


class Linear(NamedTuple):
    """All linears of one kind and shape. `kind` is the last part of their names, `num_linears` their number.

    `least_rows` is what a rank has at least: engines copy a key or value head rather than cut it.
    """

    kind: str
    rows: int
    cols: int
    is_cut_by_column: bool
    least_rows: int
    num_linears: int

    def of_rank(self, tp: int) -> tuple[int, int]:
        """Return the rows and columns that one rank of a serving engine has."""
        if self.is_cut_by_column:
            return self.rows, self.cols // tp
        return max(self.rows // tp, self.least_rows), self.cols

    @property
    def num_weights(self) -> int:
        return self.rows * self.cols * self.num_linears


def linears(model: Model) -> tuple[Linear, ...]:
    """Return the quantized linears of a model, a line for each kind and shape."""
    numbers: dict[Linear, int] = {}
    for name, shape in model.canonical().items():
        role = model.role_of(name)
        if role in LINEAR_ROLES:
            kind = name.removesuffix(".weight").rpartition(".")[2]
            least_rows = model.dims.head_dim if role in (KEY, VALUE) else 1
            linear = Linear(kind, shape[0], shape[1], role in CUT_BY_COLUMN, least_rows, 0)
            numbers[linear] = numbers.get(linear, 0) + 1
    return tuple(linear._replace(num_linears=number) for linear, number in numbers.items())


def block_weights(model: Model) -> int:
    """Return the number of weights in the linears of the largest decoder block."""

    def weights(layer: int) -> int:
        sizes = {role: model.size(role) for role in model.layer_roles(layer) if role in LINEAR_ROLES}
        copies = {role: model.dims.num_experts if role in EXPERT_ROLES else 1 for role in sizes}
        return sum(rows * cols * copies[role] for role, (rows, cols, _) in sizes.items())

    return max(weights(layer) for layer in range(model.dims.num_layers))


def serving_sizes(model: Model) -> list[int]:
    """Return the tensor-parallel sizes that engines serve this model with; more ranks than key heads copy these."""
    d = model.dims
    widths = [d.ffn_hidden_size] if not d.num_experts or d.dense_layers else []
    widths += [d.expert_ffn_hidden_size] if d.num_experts else []
    return [
        tp
        for tp in range(1, d.num_heads + 1)
        if not d.num_heads % tp
        and not (d.num_groups % tp and tp % d.num_groups)
        and not any(width % tp for width in widths)
    ]
