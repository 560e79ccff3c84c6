"""Which block of the cache holds which tokens: counted references, and whole blocks found again by what is in them.

A whole block is known by its key: a digest of its tokens and of all before them, so equal keys mean equal beginnings.
Blocks that nobody holds but that have a key stay until their room is needed, the one unused for longest going first.
Of the others the lowest number is taken first, so that memory never written stays unwritten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
KEY_BYTES = 16


def key_of(parent: bytes, tokens: Int32) -> bytes:
    """Return the key of a whole block; `parent` is the key of the block before it, b"" for the first."""
    return blake2b(tokens.tobytes(), digest_size=KEY_BYTES, key=parent).digest()


class Blocks:
    """All blocks of a cache. Whoever takes or shares one gives it back once."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._blank = list(range(num_blocks))
        heapify(self._blank)
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Blocks with a key that nobody holds, the one unused for longest first."""

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, those kept for their content included."""
        return len(self._blank) + len(self._kept)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def find(self, key: bytes) -> int | None:
        """Return the block with this key."""
        return self._by_key.get(key)

    def num_kept(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks nobody holds: sharing them makes that many fewer free."""
        return sum(1 for block in blocks if not self._references[block])

    def take(self, count: int) -> list[int]:
        """Return blocks for new content; there must be so many free."""
        assert count <= self.num_free, f"{count} blocks were asked for, {self.num_free} are free"
        taken = []
        for _ in range(count):
            block = heappop(self._blank) if self._blank else self._forget_oldest()
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks found by their keys, beside whoever holds them."""
        for block in blocks:
            if not self._references[block]:
                del self._kept[block]
            self._references[block] += 1

    def name(self, block: int, key: bytes) -> None:
        """Say what a held block holds, now that it is whole. The first block of a key is the one that is found."""
        assert self._references[block], f"block {block} is held by nobody"
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """Hold these blocks no longer. Of one sequence the last block is the first to be forgotten."""
        for block in reversed(blocks):
            assert self._references[block], f"block {block} was given back twice"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                heappush(self._blank, block)
            else:
                self._kept[block] = None

    def _forget_oldest(self) -> int:
        block, _ = self._kept.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._by_key[key]
        self._keys[block] = None
        return block
