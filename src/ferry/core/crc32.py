"""CRC-32 of a whole from the CRCs of its parts, so that a file's parts can be written in any order.

`crc32` is zlib's. The method is its `crc32_combine`: appending n bytes multiplies the CRC by x^(8n) modulo P.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

try:  # the same function, some ten times faster
    from zlib_ng.zlib_ng import crc32 as crc32
except ImportError:  # where zlib-ng has no wheel
    from zlib import crc32 as crc32

_POLYNOMIAL = 0xEDB88320
_ZEROS = bytes(1 << 20)


def _multiply(a: int, b: int) -> int:
    """Return a*b modulo P; bit 31 is the coefficient of x^0 (reflected order)."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1)
def _powers() -> tuple[int, ...]:
    """Return x^(2^k) modulo P for k = 0..66."""
    powers = [1 << 30]
    for _ in range(66):
        powers.append(_multiply(powers[-1], powers[-1]))
    return tuple(powers)


@lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """Return x^(8 * num_bytes) modulo P."""
    factor, k = 1 << 31, 3
    while num_bytes:
        if num_bytes & 1:
            factor = _multiply(_powers()[k], factor)
        num_bytes >>= 1
        k += 1
    return factor


def combine(segments: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32 of the concatenation of segments given as (crc, num_bytes)."""
    total = 0
    for crc, num_bytes in segments:
        total = _multiply(_shift(num_bytes), total) ^ crc
    return total


def of_zeros(num_bytes: int) -> int:
    """Return the CRC-32 of so many zero bytes."""
    whole, rest = divmod(num_bytes, len(_ZEROS))
    million = crc32(_ZEROS)
    return combine([(million, len(_ZEROS))] * whole + [(crc32(_ZEROS[:rest]), rest)])
