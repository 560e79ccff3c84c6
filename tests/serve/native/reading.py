"""A model small enough to know by heart: its logits are drawn from a hash of all that a sequence holds.

It is a whole executor. It keeps tokens where others keep keys and values, and reads a sequence only through its table
of blocks, so a block that is lost, shared wrongly or written twice changes every later answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from ferry.engines.engine import EngineSettings
from ferry.engines.native.executor import Batch
from ferry.engines.native.loop import NativeEngine
from ferry.engines.request import Output, Request, Sampling

NUM_TOKENS = 259
BLANK = -1


def logits_after(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the logits of the token that follows."""
    seed = crc32(np.array(tokens, np.int32).tobytes())
    return np.random.Generator(np.random.SFC64(seed)).standard_normal(NUM_TOKENS, dtype=np.float32) * 4


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """Return the likeliest answer."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


class Reader:
    """The model as an `Executor`. `steps` is what it was asked to read."""

    num_tokens = NUM_TOKENS
    dtype = "float32"
    scheme = ""
    weights_bytes = 0
    threads = 1
    notes = ()

    def __init__(self, *, block_size: int = 8, max_model_len: int = 256) -> None:
        self.block_size = self.block_bytes = block_size
        self.max_model_len = max_model_len
        self.steps: list[Batch] = []
        self.cache = np.zeros((0, block_size), np.int32)

    def step_bytes(self, num_tokens: int) -> int:
        return 1000 * num_tokens

    def close(self) -> None:
        self.cache = np.zeros((0, self.block_size), np.int32)

    def allocate(self, num_blocks: int) -> None:
        self.cache = np.full((num_blocks, self.block_size), BLANK, np.int32)

    def forward(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.steps.append(batch)
        assert len(set(batch.slots_T.tolist())) == len(batch.slots_T), "two tokens were put into one place"
        self.cache.reshape(-1)[batch.slots_T] = batch.token_ids_T
        rows = {}
        for b, length in enumerate(batch.context_lens_B.tolist()):
            start, stop = batch.query_starts_B1[b : b + 2].tolist()
            held = self.cache[batch.block_tables_BM[b]].reshape(-1)[:length]
            assert (held != BLANK).all(), "a sequence reads what was never written"
            assert batch.positions_T[start:stop].tolist() == list(range(length - (stop - start), length))
            for row in set(range(start, stop)) & set(batch.logits_rows_R.tolist()):
                rows[row] = logits_after(held[: length - (stop - row) + 1].tolist())
        return np.stack([rows[row] for row in batch.logits_rows_R.tolist()] or [np.zeros(NUM_TOKENS, np.float32)])[
            : len(batch.logits_rows_R)
        ]


def engine_of(reader: Reader, *, num_blocks: int = 64, model: Path = Path("none"), **settings: Any) -> NativeEngine:
    """Return an engine with so many blocks, and a context that fits into them."""
    reader.max_model_len = min(reader.max_model_len, num_blocks * reader.block_size)
    cache = num_blocks * reader.block_bytes
    return NativeEngine(EngineSettings(model, kv_cache_memory_bytes=cache, **settings), reader)


def ask(name: str, prompt: Sequence[int], grammar: str = "", **sampling: Any) -> Request:
    """Return a request; greedy where nothing else is said."""
    return Request(name, tuple(prompt), Sampling(**{"temperature": 0.0, **sampling}), grammar)


def run(engine: NativeEngine) -> dict[str, list[Output]]:
    """Return the outputs of all requests."""
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    """Return the tokens of an answer."""
    return [token for output in outputs for token in output.token_ids]


def answers(engine: NativeEngine, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Return the answers to requests added at once."""
    for request in requests:
        engine.add(request)
    return {name: tokens_of(outputs) for name, outputs in run(engine).items()}
