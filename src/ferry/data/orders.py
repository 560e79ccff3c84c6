"""Orders: permutations and splits as pure functions of a seed.

They are made from the raw numbers of a PCG64 generator, whose stream numpy promises never to change; its `shuffle`
carries no such promise. So a run resumed with another numpy sees the same samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

SHUFFLE, DRAW, SPLIT = 1, 2, 3
"""What a stream of numbers is for; two uses never share one."""


def raw_numbers(num: int, *words: int) -> npt.NDArray[np.uint64]:
    """Return `num` numbers of 64 bits that depend on the words alone. A longer list begins with the shorter one."""
    generator = np.random.PCG64(np.random.SeedSequence([_unsigned(word) for word in words]))
    return np.atleast_1d(generator.random_raw(num)) if num else np.zeros(0, np.uint64)


def permutation(num: int, *words: int) -> Int64:
    """Return the numbers 0 ... num-1 in an order that depends on the words alone."""
    return np.argsort(raw_numbers(num, *words), kind="stable").astype(np.int64)


def split(num: int, fraction: float, seed: int, part: int = 0) -> tuple[Int64, Int64]:
    """Return indices to train on and indices held out, of set number `part`.

    Whether an index is held out depends on it and the seed only, not on how much data there is. With a fraction above 0
    and two samples or more, each side gets one at least.
    """
    numbers = raw_numbers(num, seed, SPLIT, part)
    held_out = numbers < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    if num >= 2 and fraction > 0:
        held_out[np.argmin(numbers)] = True
        held_out[np.argmax(numbers)] = False
    return np.flatnonzero(~held_out).astype(np.int64), np.flatnonzero(held_out).astype(np.int64)


def _unsigned(word: int) -> int:
    return word & (2**64 - 1)
