"""How far a result is from the original: on every layer, and in what the whole model predicts.

Perplexity alone cannot rank recipes: errors that move probabilities up and down cancel in it. KL(original || quantized)
and the share of equal first choices do not forgive that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ferry.engines.blocks import Blocks

HEAD_ROWS, TOKENS = 2048, 256
"""How much of the head, and of the predictions, is in memory at once."""
LARGEST_LOSS = 700.0


def whole_model(
    blocks: Blocks, original_BTH: torch.Tensor, quantized_BTH: torch.Tensor, ids_BT: npt.NDArray[np.int32]
) -> dict[str, Any]:
    """Return perplexity, KL and top-1 agreement of next-token predictions. The head is read a part at a time.

    The states become normed ones, in place: there may be little room.
    """
    num_windows, length = ids_BT.shape
    for stream_BTH in (original_BTH, quantized_BTH):
        for window in range(num_windows):
            stream_BTH[window] = blocks.norm(stream_BTH[window])
    # The last token of a window predicts what is not known: it is computed along, and left out.
    targets = torch.from_numpy(np.roll(ids_BT, -1, axis=1).astype(np.int64)).reshape(-1)
    streams = [stream_BTH.reshape(len(targets), -1) for stream_BTH in (original_BTH, quantized_BTH)]
    found = _predictions(blocks, streams, targets)
    loss_original, loss, kl, same = (values_T.reshape(num_windows, length)[:, :-1] for values_T in found)
    mean_original, mean = float(loss_original.mean()), float(loss.mean())
    return {
        "tokens": kl.numel(),
        "perplexity_original": _exponential(mean_original),
        "perplexity": _exponential(mean),
        "perplexity_ratio": _exponential(mean - mean_original),
        "kl": float(kl.mean()),
        "kl_by_window": kl.mean(dim=1).tolist(),
        "kl_p99": float(kl.reshape(-1).quantile(0.99)),
        "top1": float(same.mean()),
    }


def _exponential(loss: float) -> float:
    """Return a perplexity; of losses beyond all reason, the largest."""
    return math.exp(min(loss, LARGEST_LOSS))


class _Carried:
    """What is known of the predictions [T] of one model after a part of the vocabulary."""

    def __init__(self, num_tokens: int) -> None:
        self.top = torch.full((num_tokens,), -math.inf)
        self.total = torch.zeros(num_tokens, dtype=torch.float64)
        self.best = torch.zeros(num_tokens, dtype=torch.int64)
        self.target = torch.zeros(num_tokens)

    def take(
        self, part: slice, logits: torch.Tensor, row: int, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in logits [t, v] from `row` of the vocabulary on.

        Return exp(logits - top), and by how much what was summed before shrinks.
        """
        largest, place = logits.max(dim=1)
        top = torch.maximum(self.top[part], largest)
        self.best[part] = torch.where(largest > self.top[part], place + row, self.best[part])
        shrink = torch.exp((self.top[part] - top).double())
        exponentials = torch.exp(logits - top[:, None])
        self.total[part] = self.total[part] * shrink + exponentials.sum(dim=1, dtype=torch.float64)
        self.top[part] = top
        inside = (targets >= row) & (targets < row + logits.shape[1])
        found = logits.gather(1, (targets - row).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[part] = torch.where(inside, found, self.target[part])
        return exponentials, shrink

    @property
    def logsum(self) -> torch.Tensor:
        return self.top.double() + self.total.log()

    @property
    def loss(self) -> torch.Tensor:
        return self.logsum - self.target.double()


@torch.inference_mode()
def _predictions(
    blocks: Blocks, streams_TH: list[torch.Tensor], targets_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses of both models, KL, and equality of first choices [T], in float64.

    With p the original's probabilities and a, b both logits, KL = sum p (a - b) - logsumexp(a) + logsumexp(b): sums
    that can be carried along over parts of the vocabulary, rescaled whenever a larger logit comes.
    """
    count = len(targets_T)
    original, quantized = _Carried(count), _Carried(count)
    weighted = torch.zeros(count, dtype=torch.float64)
    row = 0
    for head_VH in blocks.head(HEAD_ROWS):
        for start in range(0, count, TOKENS):
            part = slice(start, start + TOKENS)
            a, b = (stream[part] @ head_VH.T for stream in streams_TH)
            shares, shrink = original.take(part, a, row, targets_T[part])
            quantized.take(part, b, row, targets_T[part])
            weighted[part] = weighted[part] * shrink + (shares * a.sub_(b)).sum(dim=1, dtype=torch.float64)
        row += len(head_VH)
    kl = weighted / original.total - original.logsum + quantized.logsum
    return original.loss, quantized.loss, kl, (original.best == quantized.best).double()
