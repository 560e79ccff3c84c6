"""A closed loop of clients against one server: output rate, time to the first token, CPU seconds of the server.

Clients stream from `/v1/completions` and count chunks that bring text; each starts its next request when one is
finished. The prompts are texts of the same number of tokens, no two alike, so that no server has them in its cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

TICKS = os.sysconf("SC_CLK_TCK")


class Found(NamedTuple):
    """What a load showed. Rates are of output tokens, prefill included."""

    num_requests: int
    num_tokens: int
    wall_s: float
    cpu_s: float
    first_token_s: float
    """The median."""

    def to_json(self) -> dict[str, float]:
        rates = {
            "tokens_per_s": self.num_tokens / self.wall_s,
            "tokens_per_cpu_s": self.num_tokens / self.cpu_s,
        }
        return {**self._asdict(), **rates}


def cpu_seconds(pid: int) -> float:
    """Return what a process and all its living children have used."""
    total, waiting = 0.0, [pid]
    while waiting:
        each = waiting.pop()
        try:
            fields = Path(f"/proc/{each}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting += map(int, (task / "children").read_text(encoding="ascii").split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def resident_mib(pid: int) -> float:
    """Return the memory of a process and its children; pages they share count once for each."""
    total, waiting = 0.0, [pid]
    while waiting:
        each = waiting.pop()
        try:
            status = Path(f"/proc/{each}/status").read_text(encoding="ascii")
            total += int(status.partition("VmRSS:")[2].split()[0]) / 1024 if "VmRSS:" in status else 0
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting += map(int, (task / "children").read_text(encoding="ascii").split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


async def load(
    url: str, pid: int, prompts: Sequence[str], num_clients: int, num_new: int, extra: dict[str, Any]
) -> Found:
    """Let clients ask until the prompts are used up."""
    waiting = list(prompts)
    firsts: list[float] = []
    tokens = 0

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal tokens
        while waiting:
            body = {"prompt": waiting.pop(), "max_tokens": num_new, "temperature": 0, "stream": True, **extra}
            started, first = time.perf_counter(), None
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    if chunk.get("choices") and first is None:
                        first = time.perf_counter() - started
                    usage = chunk.get("usage")
                    if usage:
                        tokens += usage["completion_tokens"]
            assert first is not None
            firsts.append(first)

    begun_cpu, begun = cpu_seconds(pid), time.perf_counter()
    async with httpx.AsyncClient(timeout=600) as http:
        await asyncio.gather(*(client(http) for _ in range(num_clients)))
    wall_s = time.perf_counter() - begun
    return Found(len(prompts), tokens, wall_s, cpu_seconds(pid) - begun_cpu, statistics.median(firsts))
