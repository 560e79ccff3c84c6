"""What is refused before an engine is started, with what to do instead: lengths, rope scaling, memory.

Judged from config.json and headers alone, the same way for every engine, so that nobody waits for a model to load to
read that it does not fit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ferry.core.errors import ConfigError, InputError, LayoutError, did_you_mean
from ferry.core.units import size_text
from ferry.engines.engine import EngineSettings
from ferry.engines.hardware import Place
from ferry.engines.model_facts import ModelFacts

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "deepseek_yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "mrope": (),
    "proportional": (),
}
"""The kinds of rope scaling that engines compute, and what each must be given."""
ASSUMED_LENGTH = 2048
"""Tokens, where a config.json names no longest text: what vLLM assumes too."""
LEAST_LENGTH = 256
"""A context shorter than this is no use to anybody: rather refuse."""
VALUES_OF_A_BYTE = 2
"""Of weights of 4 bits."""
STEP = 16
CACHED_TOKENS = 32 * 1024
"""Tokens that Ferry's own engine keeps room for where nobody says."""
BIGGEST_SHARE = 0.95


class Memory(NamedTuple):
    """What a model takes on one device, and what that leaves for keys and values."""

    weights_bytes: int
    reserve_bytes: int
    cache_bytes: int
    bytes_per_token: int
    cache_tokens: int
    """Tokens that fit into the cache; 0 where it cannot be computed."""
    max_model_len: int
    notes: tuple[str, ...] = ()
    is_lower: bool = False
    """Whether the cache is smaller than the share that was asked for, or the length than the model's."""

    @property
    def total_bytes(self) -> int:
        """Return all of it."""
        return self.weights_bytes + self.reserve_bytes + self.cache_bytes


def check_model(facts: ModelFacts, settings: EngineSettings) -> None:
    """Refuse a rope scaling nobody computes, a length the model was not made for, ranks that do not divide it."""
    _check_rope(facts)
    _check_length(facts, settings)
    _check_ranks(facts, settings)


def compute_dtype(facts: ModelFacts, settings: EngineSettings, *, on_cpu: bool, widens: bool = False) -> str:
    """Return the type an engine computes in. `widens`: as in `EngineKind`."""
    if widens:
        return "float32"
    if facts.is_gguf:
        return "float16"  # what llama.cpp keeps keys and values in
    if settings.dtype != "auto":
        return settings.dtype
    if on_cpu:
        from ferry.devices.cpu import DEVICE

        return DEVICE.dtype().dtype
    return facts.dtype if facts.dtype in ("bfloat16", "float16") else "float16"


def plan_memory(
    facts: ModelFacts, settings: EngineSettings, place: Place, dtype: str, *, widens: bool = False
) -> Memory:
    """Divide a device's memory; refuse what does not fit, saying what to lower and to what. `widens`: as above."""
    held = facts.dtype if widens else dtype
    ranks = settings.tensor_parallel_size
    is_rounded = settings.quantization == "w8a8"
    if place.unpacks and facts.scheme == "W4A16":
        values = facts.float_values + facts.integer_bytes * VALUES_OF_A_BYTE
        facts = replace(facts, float_values=values, integer_bytes=0)
    weights = facts.weights_bytes(held, is_rounded=is_rounded) // ranks
    per_token = -(-facts.cache_bytes_per_token(dtype) // ranks)
    length = settings.max_model_len or facts.max_positions or ASSUMED_LENGTH
    if not place.total_bytes or not per_token:
        return Memory(weights, place.reserve_bytes, settings.kv_cache_memory_bytes or 0, per_token, 0, length)
    fixed = weights + place.reserve_bytes
    if fixed + LEAST_LENGTH * per_token > place.free_bytes:
        raise _weights_too_large(facts, settings, place, held, fixed)
    settings, notes = _within_reach(settings, place, fixed)
    cache = _cache_bytes(settings, place, fixed, per_token, length)
    tokens = cache // per_token // STEP * STEP
    if tokens < length:
        if settings.max_model_len is not None or tokens < LEAST_LENGTH:
            raise _length_too_large(settings, place, fixed, per_token, length, tokens)
        notes += (
            f"max_model_len: {tokens} tokens, because the cache holds no more; the model's own limit is {length} "
            f"({facts.max_positions_from or 'assumed'})",
        )
        length = tokens
    return Memory(weights, place.reserve_bytes, cache, per_token, cache // per_token, length, notes, bool(notes))


def _check_rope(facts: ModelFacts) -> None:
    rope = facts.rope
    if not rope or not any(key in rope for key in ("rope_type", "type", "factor")):
        return
    kind = str(rope.get("rope_type", rope.get("type", "")))
    where = f"{facts.path / 'config.json'}"
    if kind not in ROPE_KEYS:
        known = [name for name in ROPE_KEYS if name != "su"]
        raise InputError(
            f"{where} has rope scaling of type {kind!r}, expected one of {', '.join(known)}{did_you_mean(kind, known)}",
            code="serve.rope",
            repair="the answers would be wrong without it: use a release of Ferry and of the engine that knows it",
        )
    missing = [key for key in ROPE_KEYS[kind] if rope.get(key) is None]
    if missing:
        raise InputError(
            f"{where} has rope scaling of type {kind} without {', '.join(missing)}",
            code="serve.rope",
            repair="take config.json from the original model again",
        )


def _check_length(facts: ModelFacts, settings: EngineSettings) -> None:
    if not settings.max_model_len or not facts.max_positions or settings.max_model_len <= facts.max_positions:
        return
    raise ConfigError(
        f"max_model_len={settings.max_model_len} is more than the model's {facts.max_positions} tokens "
        f"({facts.max_positions_from}, {facts.path})",
        code="serve.max-model-len",
        repair=f"use --max-model-len {facts.max_positions} or less; only if the model was made for longer texts, "
        "correct its config.json",
    )


def _check_ranks(facts: ModelFacts, settings: EngineSettings) -> None:
    ranks, heads = settings.tensor_parallel_size, facts.num_kv_heads
    if ranks == 1 or not heads or heads % ranks == 0 or ranks % heads == 0:
        return
    fitting = [str(number) for number in range(1, heads + 1) if heads % number == 0]
    raise LayoutError(
        f"tensor_parallel_size={ranks} does not divide the {heads} key-value heads of the model",
        code="serve.ranks",
        repair=f"use {', '.join(fitting)}",
    )


def _within_reach(settings: EngineSettings, place: Place, fixed: int) -> tuple[EngineSettings, tuple[str, ...]]:
    """Turn a share of this machine's memory that is not free into what is: others live here, unlike on accelerators."""
    share = settings.gpu_memory_utilization
    if (
        share is None
        or not place.on_cpu
        or settings.kv_cache_memory_bytes
        or share * place.total_bytes <= place.free_bytes
    ):
        return settings, ()
    cache = int(BIGGEST_SHARE * place.free_bytes) - fixed
    note = (
        f"gpu_memory_utilization={share:g} of {size_text(place.total_bytes)} is more than the "
        f"{size_text(place.free_bytes)} free: {size_text(cache)} are taken for keys and values"
    )
    return replace(settings, gpu_memory_utilization=None, kv_cache_memory_bytes=cache), (note,)


def _cache_bytes(settings: EngineSettings, place: Place, fixed: int, per_token: int, length: int) -> int:
    """Return what the cache may take; refuse more than is free."""
    room = place.free_bytes - fixed
    if settings.kv_cache_memory_bytes is not None:
        if settings.kv_cache_memory_bytes > room:
            raise ConfigError(
                f"kv_cache_memory={size_text(settings.kv_cache_memory_bytes)} and {size_text(fixed)} for the model are "
                f"more than the {size_text(place.free_bytes)} free on {place.name}",
                code="serve.memory",
                repair=f"use --kv-cache-memory {room // 10**6}MB or less",
            )
        return settings.kv_cache_memory_bytes
    share = settings.gpu_memory_utilization or place.default_share
    if share is None:
        return min(max(length, CACHED_TOKENS) * per_token, room // 2)
    taken = int(place.total_bytes * share)
    if taken > place.free_bytes:
        most = int(100 * place.free_bytes / place.total_bytes) / 100
        raise ConfigError(
            f"gpu_memory_utilization={share:g} would take {size_text(taken)} of {place.name}, where "
            f"{size_text(place.free_bytes)} of {size_text(place.total_bytes)} are free",
            code="serve.memory",
            repair=f"use --gpu-memory-utilization {most:g} or less, or end what else takes memory there",
        )
    if taken < fixed + LEAST_LENGTH * per_token:
        least = (fixed + LEAST_LENGTH * per_token) / place.total_bytes
        raise ConfigError(
            f"gpu_memory_utilization={share:g} is {size_text(taken)} of {place.name}, and the model takes "
            f"{size_text(fixed)} without any cache",
            code="serve.memory",
            repair=f"use --gpu-memory-utilization {_up(least):g} or more",
        )
    return taken - fixed


def _weights_too_large(
    facts: ModelFacts, settings: EngineSettings, place: Place, dtype: str, fixed: int
) -> ConfigError:
    smaller = []
    ranks = settings.tensor_parallel_size
    rounded = facts.weights_bytes(dtype, is_rounded=True) // ranks
    if not facts.format and settings.quantization != "w8a8" and rounded + place.reserve_bytes < place.free_bytes:
        smaller.append(f"-q w8a8 with --engine native ({size_text(rounded)})")
    half = facts.weights_bytes("bfloat16") // ranks
    if (
        dtype == "float32"
        and half < facts.weights_bytes(dtype) // ranks
        and half + place.reserve_bytes < place.free_bytes
    ):
        smaller.append(f"--dtype bfloat16 ({size_text(half)}, slow on a CPU without it)")
    smaller.append("a smaller or quantized model (`ferry quantize`)")
    return ConfigError(
        f"the weights take {size_text(fixed - place.reserve_bytes)} in {dtype} and the engine "
        f"{size_text(place.reserve_bytes)}, and {size_text(place.free_bytes)} are free on {place.name}",
        code="serve.memory",
        repair=f"use {', or '.join(smaller)}",
    )


def _length_too_large(
    settings: EngineSettings, place: Place, fixed: int, per_token: int, length: int, tokens: int
) -> ConfigError:
    needed = length * per_token
    ways = [f"--max-model-len {tokens} or less"] if tokens >= LEAST_LENGTH else []
    if fixed + needed <= place.free_bytes:
        ways.append(f"--kv-cache-memory {-(-needed // 10**6)}MB")
        share = _up((fixed + needed) / place.total_bytes)
        if settings.gpu_memory_utilization is not None and share <= BIGGEST_SHARE:
            ways.append(f"--gpu-memory-utilization {share:g}")
    return ConfigError(
        f"one text of {length} tokens (max_model_len) needs {size_text(needed)} of cache, {size_text(per_token)} a "
        f"token; {size_text(tokens * per_token)} are there beside {size_text(fixed)} for the model on {place.name}",
        code="serve.memory",
        repair=f"use {', or '.join(ways) or 'a smaller model'}",
    )


def _up(share: float) -> float:
    """Return a share rounded up to two digits, as one would type it."""
    return -(-share * 100 // 1) / 100
