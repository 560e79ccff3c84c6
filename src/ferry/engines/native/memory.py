"""How many blocks the cache of keys and values gets, from what the machine has and what the user said.

With a size, that size. With a share of the memory, what the weights and a step leave of it. With neither, enough for
32 answers of 1,024 tokens or one longest, but no more than half of what is free: others live on this machine too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ferry.core.errors import ConfigError
from ferry.core.units import size_text
from ferry.engines.engine import EngineSettings
from ferry.engines.hardware import KERNELS_BYTES, free_memory_bytes, total_memory_bytes
from ferry.engines.native.executor import Executor
from ferry.engines.native.scheduler import MAX_PROMPT_ROWS

USUAL_TOKENS = 32 * 1024
LEAST_TOKENS = 256
"""A shorter context than this is no use to anyone: rather an error."""


class Memory(NamedTuple):
    """What there is: of the machine or of the container, whichever is less."""

    total_bytes: int
    free_bytes: int
    used_bytes: int
    """By this process."""


class Room(NamedTuple):
    """The cache as decided. `max_model_len` is lower than the model's where the cache does not hold more."""

    num_blocks: int
    max_model_len: int
    notes: tuple[str, ...]


def room(executor: Executor, settings: EngineSettings, memory: Memory) -> Room:
    """Decide the size of the cache; raise ConfigError where it would not hold what was asked for."""
    length, block_size = executor.max_model_len, executor.block_size
    longest = _blocks(length, block_size)
    if settings.kv_cache_memory_bytes is not None:
        num_blocks = settings.kv_cache_memory_bytes // executor.block_bytes
        source = f"--kv-cache-memory {size_text(settings.kv_cache_memory_bytes)} holds"
        remedy = f"raise it to {size_text(longest * executor.block_bytes)}"
    elif settings.gpu_memory_utilization is not None:
        share = settings.gpu_memory_utilization
        needed = max(memory.used_bytes, executor.weights_bytes) + _step_bytes(executor, settings) + KERNELS_BYTES
        num_blocks = max(0, int(share * memory.total_bytes) - needed) // executor.block_bytes
        source = f"--gpu-memory-utilization {share:g} of {size_text(memory.total_bytes)} leaves"
        remedy = "raise it" if share < 0.9 else "use a smaller or a quantized model"
    else:
        usual = max(longest, _blocks(USUAL_TOKENS, block_size))
        num_blocks = min(usual, memory.free_bytes // 2 // executor.block_bytes)
        source = f"half of the {size_text(memory.free_bytes)} that are free holds"
        remedy = "give it more by --kv-cache-memory"
    tokens = num_blocks * block_size
    held = f"{source} {tokens:,} tokens of keys and values ({size_text(executor.block_bytes / block_size)} each)"
    if num_blocks >= longest:
        return Room(num_blocks, length, (f"cache: {held}",) if num_blocks < _blocks(USUAL_TOKENS, block_size) else ())
    if settings.max_model_len is not None or tokens < LEAST_TOKENS:
        lower = f"lower --max-model-len to at most {tokens}, or " if tokens >= LEAST_TOKENS else ""
        raise ConfigError(
            f"{held}; --max-model-len is {length:,}", code="engine.cache-too-small", repair=f"{lower}{remedy}"
        )
    note = f"max_model_len {length:,} -> {tokens:,}: {held}; {remedy} for more"
    return Room(num_blocks, tokens, (note,))


def memory_now() -> Memory:
    """Return what the machine, its containers and this process say."""
    return Memory(total_memory_bytes(), free_memory_bytes(), _resident_bytes())


def _blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _step_bytes(executor: Executor, settings: EngineSettings) -> int:
    """Return what one step needs at most: what the model works in, and the logits, twice."""
    logits = 2 * 4 * executor.num_tokens * (settings.max_num_seqs + MAX_PROMPT_ROWS)
    return logits + executor.step_bytes(settings.max_num_batched_tokens)


def _resident_bytes() -> int:
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
