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
        for start in range(0, h_NH.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            loss_n, grad_nV = _chunk(h_NH[rows], head_VH, labels_N[rows], vocabulary, need_h or need_head)
            total += loss_n.sum()
            if grad_h is not None:
                torch.mm(grad_nV, head_VH, out=grad_h[rows])
            if grad_head is not None:
                grad_head.addmm_(grad_nV.t(), h_NH[rows])
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


def _chunk(
    h_nH: torch.Tensor, head_VH: torch.Tensor, labels_n: torch.Tensor, vocabulary: Vocabulary, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of some rows and, in the dtype of h, the gradient of their sum with respect to the logits."""
    logits_nV = (h_nH @ head_VH.t()).float()
    group = vocabulary.group
    if vocabulary.num_real < logits_nV.shape[1]:
        logits_nV[:, vocabulary.num_real :] = float("-inf")  # padding takes no share of the softmax
    top_n = logits_nV.amax(dim=1)
    if group is not None:
        dist.all_reduce(top_n, op=dist.ReduceOp.MAX, group=group)
    logits_nV.sub_(top_n[:, None])
    local_n = labels_n - vocabulary.first
    mine_n = (local_n >= 0) & (local_n < logits_nV.shape[1])
    index_n1 = local_n.clamp(0, logits_nV.shape[1] - 1)[:, None]
    target_n = torch.where(mine_n, logits_nV.gather(1, index_n1)[:, 0], torch.zeros_like(top_n))
    exp_nV = logits_nV.exp_()
    sum_n = exp_nV.sum(dim=1)
    if group is not None:
        both_2n = torch.stack([sum_n, target_n])
        dist.all_reduce(both_2n, group=group)
        sum_n, target_n = both_2n[0], both_2n[1]
    loss_n = sum_n.log() - target_n
    if need_grad:
        exp_nV.div_(sum_n[:, None])
        exp_nV.scatter_add_(1, index_n1, -mine_n[:, None].to(exp_nV.dtype))
    return loss_n, exp_nV.to(h_nH.dtype)
