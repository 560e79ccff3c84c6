"""Starts writing to disk early, so that the final sync has little left to do.

Linux keeps written pages in memory until a good part of it is dirty; a sync at the end then waits for all of them.
`sync_file_range` starts the transfer without waiting. Where the system has no such call, nothing happens here.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import cache

STEP_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


class Writeback:
    """Counts what is written to each file and starts its transfer every `STEP_BYTES`. Safe to share by threads."""

    def __init__(self) -> None:
        self._waiting: dict[int, int] = defaultdict(int)
        self._lock = threading.Lock()

    def wrote(self, fd: int, num_bytes: int) -> None:
        """Note a write; errors of the early start do not matter, the final sync reports them."""
        with self._lock:
            self._waiting[fd] += num_bytes
            if self._waiting[fd] < STEP_BYTES:
                return
            self._waiting[fd] = 0
        call = _sync_file_range()
        if call is not None:
            call(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)
