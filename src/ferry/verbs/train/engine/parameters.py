"""The trainable parameters of a rank: where each lives, which copy counts, and in which precision it is kept.

`Parameter` objects are replaced when a module is sharded (FSDP2), so a parameter is remembered by its module and
attribute and looked up when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ferry.core.layout import Local
from ferry.verbs.train.engine.placement import Place, cut_rows


@dataclass
class Held:
    """One trainable parameter of this rank."""

    place: Place
    module: nn.Module
    attribute: str
    decays: bool
    at_both_ends: bool = False
    """A tied embedding, held by the first and by the last pipeline stage: their gradients are summed."""
    source: torch.Tensor | None = field(default=None, repr=False)
    """The loaded values in float32, where they are more precise than the parameter; taken by the optimizer."""

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    @property
    def local(self) -> torch.Tensor:
        """Return what this rank holds of the parameter."""
        return local_of(self.parameter)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that may be sharded over dp."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_place(place: Place, dp: int, dp_rank: int) -> Local:
    """Return what one data-parallel rank holds of a parameter under FSDP2: whole slices of its first dimension."""
    length = place.local.shape[0]
    per_slice = place.local.rows // length
    size = -(-length // dp)
    start, end = min(length, dp_rank * size), min(length, (dp_rank + 1) * size)
    part = cut_rows(place.local, start * per_slice, end * per_slice)
    return part if not place.local.declared else part._replace(declared=(end - start, *place.local.declared[1:]))
