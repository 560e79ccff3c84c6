"""How long a sequence the native engine takes of a model, what it computes in, and with how many threads.

All follow from config.json and the machine, before anything is loaded. A refusal names the limit and where it is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ferry.core.environment import usable_cores
from ferry.core.errors import ConfigError
from ferry.devices.device import Choice, find
from ferry.engines.engine import EngineSettings
from ferry.engines.model_facts import longest, rope_of, text_config

DEFAULT_LENGTH = 2048
MOST_THREADS_A_CORE = 4
CHANGES_WITH_LENGTH = ("dynamic", "longrope", "su")
"""Rotary scalings whose angles depend on the longest sequence of a batch, so that one answer would change another."""


class Context(NamedTuple):
    """The longest sequence to take; `source` says where that is from, `note` what a user should know."""

    num_tokens: int
    source: str
    note: str = ""


def longest_context(config: Mapping[str, Any]) -> Context:
    """Return the longest sequence of a model with this config.json."""
    text = text_config(config)
    stated, source = longest(text)
    if not stated:
        note = f"config.json does not say how long a sequence may be: {DEFAULT_LENGTH} tokens are assumed"
        return Context(DEFAULT_LENGTH, "", note)
    rope = rope_of(text)
    kind = str(rope.get("rope_type") or rope.get("type") or "")
    if kind in CHANGES_WITH_LENGTH:
        key = "original_max_position_embeddings"
        original = rope.get(key) or text.get(key) or text.get("max_position_embeddings")
        if original and original < stated:
            note = f"{kind} rope scaling changes all positions once a sequence is longer than {original} tokens"
            return Context(int(original), f"{key} in config.json", f"{note}: longer ones are not taken")
    chunk = text.get("attention_chunk_size")
    if isinstance(chunk, int) and chunk < stated:
        note = f"attention in chunks is followed within the first one: {chunk} tokens"
        return Context(chunk, "attention_chunk_size in config.json", note)
    return Context(stated, source)


def context_length(config: Mapping[str, Any], asked: int | None) -> Context:
    """Return the longest sequence to serve: what is asked for, or all that the model takes."""
    found = longest_context(config)
    if asked is None:
        return found
    if asked > found.num_tokens and found.source:
        reason = f" ({found.note})" if found.note else ""
        raise ConfigError(
            f"--max-model-len {asked} is more than the model takes: {found.num_tokens}, from {found.source}{reason}",
            code="serve.max-model-len",
            repair=f"use --max-model-len {found.num_tokens} or less; a model that was trained for more says so there",
        )
    return Context(asked, found.source)


def compute_dtype(settings: EngineSettings) -> Choice:
    """Return the type to compute in on the CPU, and why."""
    best = find("cpu").dtype()
    if settings.dtype == "auto":
        return best
    if settings.dtype == "float16":
        return Choice("float32", "float16 is asked for; a CPU computes it in float32, which holds all its values")
    if settings.dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"--dtype {settings.dtype} is unknown", code="engine.dtype", repair="use auto, float32, bfloat16 or float16"
        )
    if settings.dtype != best.dtype == "float32":
        return Choice(settings.dtype, f"asked for, though {best.reason}")
    return Choice(settings.dtype, "asked for")


def num_threads(settings: EngineSettings) -> int:
    """Return how many threads compute: as many as this process has cores, unless told."""
    cores = usable_cores()
    if settings.threads is not None and settings.threads > MOST_THREADS_A_CORE * cores:
        raise ConfigError(
            f"--threads {settings.threads}: this process has {cores} cores, and more threads only wait for each other",
            code="engine.threads",
            repair=f"use --threads {cores}, or leave it out",
        )
    return settings.threads or cores
