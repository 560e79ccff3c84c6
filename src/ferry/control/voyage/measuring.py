"""What a step cost: wall seconds, CPU seconds, peak memory."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ferry.core.record import peak_rss_bytes


@dataclass
class Cost:
    """Filled in when the measured block ends; `peak_rss_bytes` may be set inside it, for a process of its own."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a block of this process and of the children that end within it."""
    cost = Cost()
    can_reset = _forget_peak()
    began_s, cpu_s = time.monotonic(), _cpu_seconds()
    try:
        yield cost
    finally:
        cost.seconds = round(time.monotonic() - began_s, 3)
        cost.cpu_s = round(_cpu_seconds() - cpu_s, 3)
        if not cost.peak_rss_bytes and can_reset:
            cost.peak_rss_bytes = peak_rss_bytes()


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _forget_peak() -> bool:
    """Let the peak begin anew; where the system cannot, a step's own peak is unknown and stays 0."""
    try:
        fd = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(fd, b"5")
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
