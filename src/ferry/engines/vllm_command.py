"""The command and the environment variables a vLLM server is started with. Pure: settings in, words out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields

from ferry.core.environment import usable_cores
from ferry.core.errors import ConfigError
from ferry.core.interpreter import SAFE_PATH, foreign_module_words
from ferry.engines.engine import EngineSettings
from ferry.engines.hardware import Place
from ferry.engines.model_facts import ModelFacts
from ferry.engines.preflight import compute_dtype, plan_memory
from ferry.engines.server_process import LOCAL
from ferry.engines.vllm_environment import Adapter, Environment
from ferry.recipes.engines import cpu_level

SERVED_AS = "ferry"
"""What the model is called between the front end and vLLM."""
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "FERRY_VLLM_ENV")
GIB = 1 << 30


def command(
    settings: EngineSettings, environment: Environment, adapter: Adapter, facts: ModelFacts, place: Place, port: int
) -> list[str]:
    """Return the words that start the server."""
    words = [
        str(environment.python), *foreign_module_words("vllm.entrypoints.cli.main"), "serve", str(settings.model),
        "--host", LOCAL, "--port", str(port), "--served-model-name", SERVED_AS,
        # Values that a request leaves out are the front end's matter.
        "--generation-config", "vllm",
        "--enable-prompt-tokens-details", "--uvicorn-log-level", "warning",
        *adapter.guidance_words,
        "--dtype", dtype_word(settings, environment, facts),
        "--seed", str(settings.seed), "--max-num-seqs", str(settings.max_num_seqs),
        "--tensor-parallel-size", str(settings.tensor_parallel_size),
        "--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching",
    ]  # fmt: skip
    if facts.format == "ascend":
        words += ["--quantization", "ascend"]
    if settings.max_model_len is not None:
        words += ["--max-model-len", str(settings.max_model_len)]
    if settings.block_size is not None:
        words += ["--block-size", str(settings.block_size)]
    if settings.gpu_memory_utilization is not None:
        words += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization:g}"]
    if settings.max_num_batched_tokens != _default("max_num_batched_tokens"):
        # Ferry's default suits a CPU; vLLM's own suits the hardware it finds.
        words += ["--max-num-batched-tokens", str(settings.max_num_batched_tokens)]
    if settings.trust_remote_code:
        words.append("--trust-remote-code")
    words += _cache_words(settings, environment, adapter, facts, place)
    if environment.is_for_cpu and "--enforce-eager" not in settings.further:
        words.append("--enforce-eager")  # compiling takes minutes on a CPU, and gains little there
    return words + list(settings.further)


def variables(settings: EngineSettings, environment: Environment, key: str) -> dict[str, str]:
    """Return the environment variables of the server: this process's, without what would lead it astray."""
    own = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    own |= SAFE_PATH
    own |= {
        # In a variable, because others can read a command line.
        "VLLM_API_KEY": key,
        "PATH": f"{environment.python.parent}{os.pathsep}{own.get('PATH', '')}",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    if environment.is_for_cpu:
        threads = str(settings.threads or usable_cores())
        # Threads that are bound to cores starve beside anything else that runs there.
        own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        if settings.kv_cache_memory_bytes is not None:
            own["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, settings.kv_cache_memory_bytes // GIB))
    return own


def dtype_word(settings: EngineSettings, environment: Environment, facts: ModelFacts) -> str:
    """Return the type vLLM computes in; its own choice on a CPU is a slow one where bfloat16 is emulated."""
    if settings.dtype != "auto" or not environment.is_for_cpu:
        return settings.dtype
    if facts.scheme == "W8A8" and cpu_level() == "AVX512":
        return "bfloat16"  # its 8-bit kernel for AVX512 takes no float32
    return compute_dtype(facts, settings, on_cpu=True)


def explain(settings: EngineSettings, environment: Environment, facts: ModelFacts) -> tuple[str, ...]:
    """Return what was chosen for vLLM and why, one sentence each."""
    said = [environment.described]
    if environment.is_for_cpu and settings.dtype == "auto":
        said.append(f"dtype {dtype_word(settings, environment, facts)}: what this CPU multiplies in hardware")
    if environment.is_for_cpu:
        said.append("compiled by nobody (--enforce-eager): compiling takes minutes on a CPU")
    return tuple(said)


def body_grammar(adapter: Adapter, grammar: str) -> Mapping[str, object]:
    """Return the field of a request that holds its grammar, as this release calls it."""
    outer, _, inner = adapter.grammar_field.partition(".")
    return {outer: {inner: grammar} if inner else grammar}


def _cache_words(
    settings: EngineSettings, environment: Environment, adapter: Adapter, facts: ModelFacts, place: Place
) -> list[str]:
    """Say how large the cache is. On a CPU vLLM would take nearly all memory: it gets what Ferry's engine takes."""
    size = settings.kv_cache_memory_bytes
    if size is None and environment.is_for_cpu and settings.gpu_memory_utilization is None and adapter.cache_flag:
        dtype = dtype_word(settings, environment, facts)
        size = plan_memory(facts, settings, place, dtype).cache_bytes or None
    if size is None:
        return []
    if not adapter.cache_flag and not environment.is_for_cpu:
        raise ConfigError(
            f"vllm {environment.version} has no size of its cache in bytes",
            code="engine.option",
            repair="use --gpu-memory-utilization instead of --kv-cache-memory, or a newer vLLM",
        )
    return [adapter.cache_flag, str(size)] if adapter.cache_flag else []


def _default(name: str) -> object:
    return next(each.default for each in fields(EngineSettings) if each.name == name)
