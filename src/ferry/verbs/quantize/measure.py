"""How far a result is from the original: on every layer, and in what the whole model predicts.

Perplexity alone cannot rank recipes: errors that move probabilities up and down cancel in it. KL(original || quantized)
and the share of equal first choices do not forgive that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ferry.engines.blocks import Blocks

HEAD_ROWS, TOKENS = 4096, 512


class Distance(NamedTuple):
    """Squared error over squared norm (NMSE), and the cosine, of a tensor to the one it should be."""

    nmse: float
    cosine: float


def distance(found: torch.Tensor, wanted: torch.Tensor) -> Distance:
    """Return how far a tensor is from another one, accumulated in float64."""
    x, y = found.reshape(-1).double(), wanted.reshape(-1).double()
    norm, own = float(y @ y), float(x @ x)
    if not norm:
        return Distance(0.0 if not own else math.inf, 1.0 if not own else 0.0)
    return Distance(float((x - y) @ (x - y)) / norm, float(x @ y) / math.sqrt(norm * own) if own else 0.0)


def whole_model(
    blocks: Blocks, original_BTH: torch.Tensor, quantized_BTH: torch.Tensor, ids_BT: npt.NDArray[np.int32]
) -> dict[str, Any]:
    """Return perplexity, KL and top-1 agreement of next-token predictions. The head is read a part at a time."""
    num_windows, length = ids_BT.shape
    targets = torch.from_numpy(ids_BT[:, 1:].astype(np.int64)).reshape(-1)
    streams = [blocks.norm(stream)[:, :-1].reshape(-1, stream.shape[-1]) for stream in (original_BTH, quantized_BTH)]
    measured = []
    for start in range(0, len(targets), TOKENS):
        part = slice(start, start + TOKENS)
        measured.append(_predictions(blocks, streams[0][part], streams[1][part], targets[part]))
    loss_original, loss, kl, same = (torch.cat(column) for column in zip(*measured, strict=True))
    mean_original, mean = float(loss_original.mean()), float(loss.mean())
    return {
        "tokens": len(targets),
        "perplexity_original": math.exp(mean_original),
        "perplexity": math.exp(mean),
        "perplexity_ratio": math.exp(mean - mean_original),
        "kl": float(kl.mean()),
        "kl_by_window": kl.reshape(num_windows, length - 1).mean(dim=1).tolist(),
        "kl_p99": float(kl.quantile(0.99)),
        "top1": float(same.mean()),
    }


@torch.inference_mode()
def _predictions(
    blocks: Blocks, original_TH: torch.Tensor, quantized_TH: torch.Tensor, targets_T: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the losses of both models, KL and equality of first choices [T], in float64.

    With p the original's probabilities and a, b both logits, KL = sum p (a - b) - logsumexp(a) + logsumexp(b): sums
    that can be carried along over parts of the vocabulary, rescaled whenever a larger logit comes.
    """
    count = len(targets_T)
    low = torch.full((count,), -math.inf, dtype=torch.float64)
    zero = torch.zeros(count, dtype=torch.float64)
    places = torch.zeros(count, dtype=torch.int64)
    tops, totals, bests, chosen = [low, low], [zero, zero], [places, places], [zero, zero]
    weighted = zero
    row = 0
    for head_VH in blocks.head(HEAD_ROWS):
        parts = [(stream @ head_VH.T).double() for stream in (original_TH, quantized_TH)]
        shares = torch.zeros(0)
        for side, logits in enumerate(parts):
            largest, place = logits.max(dim=1)
            top = torch.maximum(tops[side], largest)
            bests[side] = torch.where(largest > tops[side], place + row, bests[side])
            shrink = torch.exp(tops[side] - top)
            exponentials = torch.exp(logits - top[:, None])
            totals[side] = totals[side] * shrink + exponentials.sum(dim=1)
            tops[side] = top
            if not side:
                weighted, shares = weighted * shrink, exponentials
            inside = (targets_T >= row) & (targets_T < row + len(head_VH))
            found = logits.gather(1, (targets_T - row).clamp(0, len(head_VH) - 1)[:, None])[:, 0]
            chosen[side] = torch.where(inside, found, chosen[side])
        weighted = weighted + (shares * (parts[0] - parts[1])).sum(dim=1)
        row += len(head_VH)
    logsums = [top + total.log() for top, total in zip(tops, totals, strict=True)]
    kl = weighted / totals[0] - logsums[0] + logsums[1]
    losses = [logsum - logit for logsum, logit in zip(logsums, chosen, strict=True)]
    return losses[0], losses[1], kl, (bests[0] == bests[1]).double()
