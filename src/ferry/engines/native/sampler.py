"""How a token is drawn from a row of logits, and how probable it was. Rows are worked on one by one.

So a draw depends on its row, its settings and its seed, and on nothing that runs beside it. The number behind a draw is
a hash of the seed and of the place of the token: no generator has a state. Of equal logits the lowest tokens are first.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from ferry.engines.request import TokenLogprobs

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
STRIDE = 256
"""A row is summed in pieces of so many tokens, so that a draw adds up few of them one by one."""
NUCLEUS_GUESSES = (1e-2, 1e-3, 1e-4)
"""Shares of the likeliest token's weight: where tokens above one of them weigh enough, no others are sorted."""


def uniform(seed: int, place: int) -> float:
    """Return the number in [0, 1) that belongs to a seed and a place."""
    digest = blake2b(b"%d:%d" % (seed, place), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def seed_of(text: str, seed: int) -> int:
    """Return the seed of a request that has none: its name and the engine's seed decide."""
    return int.from_bytes(blake2b(f"{seed}:{text}".encode(), digest_size=8).digest(), "little")


def survivors(relative_V: Float32, *, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Int64, Float32]:
    """Return the tokens that may be drawn, in order, and their weights.

    `relative_V` is (logits - largest) / temperature; it is overwritten.
    """
    if not min_p and not top_k:
        weights_V = np.exp(relative_V, out=relative_V)
        return _nucleus(weights_V, top_p) if top_p < 1 else (np.arange(len(weights_V)), weights_V)
    least = np.float32(math.log(min_p)) if min_p else np.finfo(np.float32).min
    if top_k and top_k < len(relative_V):
        least = max(least, _nth_largest(relative_V, top_k))
    ids = np.flatnonzero(relative_V >= least)
    weights = np.exp(relative_V[ids])
    return _cut(ids, weights, top_p * float(weights.sum(dtype=np.float64))) if top_p < 1 else (ids, weights)


def draw(relative_V: Float32, number: float, *, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> int:
    """Return the token that a number in [0, 1) stands for. `relative_V` is as above."""
    if top_p < 1 or min_p > 0 or 0 < top_k < len(relative_V):
        ids, weights = survivors(relative_V, min_p=min_p, top_k=top_k, top_p=top_p)
        return int(ids[_place(np.cumsum(weights, dtype=np.float64), number)])
    weights_V = np.exp(relative_V, out=relative_V)
    sums = np.add.reduceat(weights_V, np.arange(0, len(weights_V), STRIDE)).astype(np.float64)
    ends = np.cumsum(sums)
    piece = _place(ends, number)
    within = (number * ends[-1] - (ends[piece] - sums[piece])) / sums[piece]
    start = piece * STRIDE
    weights = weights_V[start : start + STRIDE]
    return start + _place(np.cumsum(weights, dtype=np.float64), min(max(within, 0.0), 1.0))


def likeliest(row_V: Float32, count: int) -> Int64:
    """Return the tokens of the largest logits, likeliest first."""
    ids = np.flatnonzero(row_V >= _nth_largest(row_V, count))
    return ids[np.argsort(-row_V[ids], kind="stable")[:count]]


def logprobs_of(row_V: Float32, token: int, num_top: int) -> TokenLogprobs:
    """Return how probable a token was, and which ones were likeliest."""
    peak = row_V.max()
    total = float(peak) + math.log(float(np.exp(row_V - peak).sum()))
    logit = row_V[token]
    num_ahead = int(np.count_nonzero(row_V > logit)) + int(np.count_nonzero(row_V[:token] == logit))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = likeliest(row_V, min(num_top, len(row_V)))
        top = tuple(zip(ids.tolist(), (row_V[ids].astype(np.float64) - total).tolist(), strict=True))
    return TokenLogprobs(token, float(logit) - total, num_ahead + 1, top)


def _nucleus(weights_V: Float32, top_p: float) -> tuple[Int64, Float32]:
    enough = top_p * float(weights_V.sum())
    for guess in NUCLEUS_GUESSES:
        ids = np.flatnonzero(weights_V >= guess)
        weights = weights_V[ids]
        if float(weights.sum()) > enough:
            return _cut(ids, weights, enough)
    return _cut(np.arange(len(weights_V)), weights_V, enough)


def _cut(ids: Int64, weights: Float32, enough: float) -> tuple[Int64, Float32]:
    """Return the heaviest tokens that together weigh enough, the one that makes it enough included."""
    ordered = np.sort(weights)[::-1]
    count = int(np.searchsorted(np.cumsum(ordered, dtype=np.float64), enough, side="left")) + 1
    if count >= len(ids):
        return ids, weights
    least = ordered[count - 1]
    # Of those as heavy as the last one, the lowest tokens.
    places = np.flatnonzero(weights >= least)
    num_over = len(places) - count
    if num_over:
        places = np.delete(places, np.flatnonzero(weights[places] == least)[-num_over:])
    return ids[places], weights[places]


def _nth_largest(row_V: Float32, count: int) -> np.float32:
    place = len(row_V) - count
    value: np.float32 = np.partition(row_V, place)[place]
    return value


def _place(ends: npt.NDArray[np.float64], number: float) -> int:
    """Return where a number in [0, 1] falls among cumulative weights; never on one without weight."""
    last = int(np.searchsorted(ends, ends[-1], side="left"))
    return min(int(np.searchsorted(ends, number * ends[-1], side="right")), last)
