"""Cross entropy on supervised positions only, in chunks of rows: logits never live together.

The gradient is made while a chunk's logits are there (N rows, H hidden, V vocabulary of this rank), so neither logits
nor softmax are kept for the backward pass; the idea is that of Liger-Kernel's fused linear cross entropy (Hsu et al.
2024), written here for any device and for a vocabulary that is split over ranks as Megatron-LM splits it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CHUNK_ROWS = 256


class Vocabulary(NamedTuple):
    """Which rows of the vocabulary a rank's head holds: the first, how many are real, and who holds the others."""

    first: int
    num_real: int
    group: dist.ProcessGroup | None


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_NH: torch.Tensor, head_VH: torch.Tensor, labels_N: torch.Tensor, vocabulary: Vocabulary
    ) -> torch.Tensor:
        need_h, need_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=h_NH.device)
        grad_h = torch.empty_like(h_NH) if need_h else None
        grad_head = torch.zeros_like(head_VH) if need_head else None
        # One buffer for all chunks: fresh memory of this size costs page faults each time.
        buffer = h_NH.new_empty(min(CHUNK_ROWS, h_NH.shape[0]), head_VH.shape[0])
        for start in range(0, h_NH.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits_nV = torch.mm(h_NH[rows], head_VH.t(), out=buffer[: len(h_NH[rows])])
            part = _chunk(logits_nV, labels_N[rows], vocabulary)
            total += part.loss_n.sum()
            # The gradient of the logits is exp / sum - onehot. It is never made: rows are scaled where they are short.
            if grad_h is not None:
                torch.mm(part.exp_nV, head_VH, out=grad_h[rows])
                grad_h[rows].mul_(part.scale_n1)
                grad_h[rows].sub_(head_VH[part.index_n] * part.mine_n1)
            if grad_head is not None:
                grad_head.addmm_(part.exp_nV.t(), h_NH[rows] * part.scale_n1)
                grad_head.index_add_(0, part.index_n, h_NH[rows] * part.mine_n1, alpha=-1)
        if grad_h is not None and vocabulary.group is not None:
            dist.all_reduce(grad_h, group=vocabulary.group)
        ctx.grads = (grad_h, grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = tuple(grad if grad is None else grad.mul_(grads[0]) for grad in ctx.grads)
        ctx.grads = ()
        return (*scaled, None, None)


def loss_sum(h_NH: torch.Tensor, head_VH: torch.Tensor, labels_N: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Return the sum (not the mean) of the cross entropies of N supervised positions, a float32 scalar.

    Under a split vocabulary every rank returns the same number.
    """
    return _FusedLoss.apply(h_NH, head_VH, labels_N, vocabulary)  # type: ignore[no-any-return, no-untyped-call]


class _Part(NamedTuple):
    """A chunk's losses, and what its gradients are made of, in the dtype of the logits.

    `index_n` is the row of the head that belongs to each label, `mine_n1` 1 where this rank has that row, else 0.
    """

    loss_n: torch.Tensor
    exp_nV: torch.Tensor
    scale_n1: torch.Tensor
    index_n: torch.Tensor
    mine_n1: torch.Tensor


def _chunk(logits_nV: torch.Tensor, labels_n: torch.Tensor, vocabulary: Vocabulary) -> _Part:
    """Return the losses of some rows. Logits that are float32 are overwritten.

    exp and sum are taken one after the other: torch's fused softmax adds up a long row in few float32 lanes, and is
    off by some 1e-5 of it (docs/numerics.md).
    """
    values_nV = logits_nV.float()
    if vocabulary.num_real < values_nV.shape[1]:
        values_nV[:, vocabulary.num_real :] = float("-inf")  # padding takes no share of the softmax
    local_n = labels_n - vocabulary.first
    mine_n = (local_n >= 0) & (local_n < values_nV.shape[1])
    index_n = local_n.clamp(0, values_nV.shape[1] - 1)
    target_n = values_nV.gather(1, index_n[:, None])[:, 0]
    top_n = values_nV.amax(dim=1)
    if vocabulary.group is not None:
        dist.all_reduce(top_n, op=dist.ReduceOp.MAX, group=vocabulary.group)
    exp_nV = values_nV.sub_(top_n[:, None]).exp_()
    both_2n = torch.stack([exp_nV.sum(dim=1), torch.where(mine_n, target_n - top_n, 0.0)])
    if vocabulary.group is not None:
        dist.all_reduce(both_2n, group=vocabulary.group)
    sum_n, gap_n = both_2n[0], both_2n[1]
    dtype = logits_nV.dtype
    scale_n1, mine_n1 = (1.0 / sum_n)[:, None].to(dtype), mine_n[:, None].to(dtype)
    return _Part(sum_n.log() - gap_n, exp_nV.to(dtype), scale_n1, index_n, mine_n1)
