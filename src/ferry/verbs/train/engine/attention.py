"""Attention over packed rows without cross-talk, on any back end: causal attention segment by segment, and no mask.

Registered under a name with transformers' `AttentionInterface`, so that model code stays untouched. Several samples lie
in one row; positions restart with each; a query sees only its own segment. No mask tensor is ever made, except where a
sliding window is shorter than a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NAME = "ferry_packed"


def register() -> str:
    """Make the function known to transformers and return its name. Registering it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def segment_lengths(positions_T: torch.Tensor) -> tuple[int, ...]:
    """Return the lengths of the segments of a row: a new one starts where the position is 0."""
    starts = (positions_T == 0).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        starts = [0, *starts]
    ends = [*starts[1:], positions_T.shape[0]]
    return tuple(end - start for start, end in zip(starts, ends, strict=True))


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Sequence[int] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return [B, T, heads, channels] for query [B, heads, T, channels], key and value [B, groups, T, channels].

    `segments` are the lengths of the samples in the row, in order; none means one segment.
    """
    lengths = list(segments) or [query.shape[2]]
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=_window(q, sliding_window), dropout_p=dropout,
            is_causal=not _is_longer(q, sliding_window), scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
        )
        for q, k, v in zip(queries, keys, values, strict=True)
    ]  # fmt: skip
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return joined.transpose(1, 2).contiguous(), None


def _is_longer(query: torch.Tensor, sliding_window: int | None) -> bool:
    return sliding_window is not None and query.shape[2] > sliding_window


def _window(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """Return the mask of a sliding window [T, T], or None where plain causal attention is the same."""
    if sliding_window is None or not _is_longer(query, sliding_window):
        return None
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < sliding_window)
