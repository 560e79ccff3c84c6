"""The linear of a layout: a slice of a weight, the sum it may need, and an adapter if there is one.

Takes the place of `nn.Linear` (and `nn.Embedding`) in an otherwise untouched Hugging Face module. B batch, T tokens,
I input, O output channels of this rank, R rank of the adapter.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ferry.verbs.train.engine.context import MicroContext, keep_mask
from ferry.verbs.train.engine.groups import sum_over


class Adapter(nn.Module):
    """LoRA (Hu et al. 2021): scale * B @ A @ dropout(x). A and B are float32 whatever the base is."""

    def __init__(
        self, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, dropout: float, key: int, columns: range,
        context: MicroContext,
    ) -> None:  # fmt: skip
        super().__init__()
        self.a_RI = nn.Parameter(a_RI)
        self.b_OR = nn.Parameter(b_OR)
        self.scale, self.dropout, self.key, self.columns, self.context = scale, dropout, key, columns, context

    def forward(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return base + the adapter's output for x [..., I]."""
        x_TI = x.reshape(-1, x.shape[-1])
        if self.dropout and self.training:
            keep = keep_mask(self.context, self.key, self.columns, self.dropout)
            x_TI = x_TI * keep.to(x_TI.dtype) * (1.0 / (1.0 - self.dropout))
        h_TR = F.linear(x_TI, self.a_RI.to(x_TI.dtype))
        added = torch.addmm(base.reshape(-1, base.shape[-1]), h_TR, self.b_OR.to(x_TI.dtype).t(), alpha=self.scale)
        return added.view_as(base)


class Linear(nn.Module):
    """y = x W' + b on one tensor-parallel rank.

    `columns` means that W is cut along its input: partial products are summed over `group`, and the bias is added once,
    after the sum. Otherwise nothing is said here: the gradient of the input is summed where the input is made.
    """

    def __init__(
        self, weight_OI: nn.Parameter, bias_O: nn.Parameter | None, split: Literal["whole", "rows", "columns"],
        group: dist.ProcessGroup | None, adapter: Adapter | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = weight_OI
        self.bias = bias_O
        self.group = group if split == "columns" else None
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias if self.group is None else None)
        if self.adapter is not None:
            y = self.adapter(x, y)
        if self.group is None:
            return y
        y = sum_over(y, self.group)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """Rows of the vocabulary on one rank; ids of other ranks give zeros, the sum over the group is the embedding."""

    def __init__(self, weight_VH: nn.Parameter, first: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight = weight_VH
        self.first = first
        self.group = group

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return F.embedding(ids_BT, self.weight)
        local_BT = ids_BT - self.first
        mine_BT = (local_BT >= 0) & (local_BT < self.weight.shape[0])
        found_BTH = F.embedding(local_BT.clamp(0, self.weight.shape[0] - 1), self.weight)
        return sum_over(found_BTH * mine_BT[..., None].to(found_BTH.dtype), self.group)


def initial_adapter(module: str, seed: int, rank: int, num_inputs: int) -> torch.Tensor:
    """Return A [rank, inputs] as PEFT draws it (Kaiming uniform, a = sqrt 5), from (seed, module) alone."""
    import hashlib

    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / num_inputs**0.5
    uniform: Any = torch.rand(rank, num_inputs, generator=generator)
    return (uniform * 2 - 1) * bound  # type: ignore[no-any-return]
