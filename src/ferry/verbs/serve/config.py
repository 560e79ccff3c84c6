"""The options of `ferry serve`. The names are vLLM's where it has one, so that the manual's commands are taken as they
are; `vllm_options.csv` says what to do instead of each option of vLLM that is not here."""

from __future__ import annotations

import csv
import shlex
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ferry.core.config import Layer, Problem, VerbConfig, option
from ferry.core.shell_words import ShellWords
from ferry.core.units import parse_size

if TYPE_CHECKING:
    from ferry.engines.engine import EngineSettings

DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
"""vLLM's further names of data types."""


def _bytes(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _dtype(value: object) -> object:
    return DTYPES.get(value, value) if isinstance(value, str) else value


def _defaults(value: object) -> object:
    return "none" if value == "vllm" else value  # vLLM's word for taking its own defaults, not the model's


Bytes = Annotated[int, BeforeValidator(_bytes)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_dtype)]
Defaults = Annotated[Literal["auto", "none"], BeforeValidator(_defaults)]
Quantization = Literal["auto", "none", "w8a8", "smoothquant", "awq", "compressed-tensors", "ascend"]


class LimitSettings(BaseModel):
    """What one client can ask of the server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    guided_time_limit: Annotated[
        float, Field(gt=0, description="Seconds that compiling a schema, pattern or grammar may take.")
    ] = 5.0
    request_timeout: Annotated[
        float | None,
        Field(gt=0, description="Seconds a request may take, waiting included; none: as long as it takes."),
    ] = None
    max_body_bytes: Annotated[Bytes, Field(ge=1024, description="Largest body of a request.")] = 8_000_000


class ServeConfig(VerbConfig):
    """Answer over the OpenAI API on any hardware, with answers that keep their schema.

    `ferry serve MODEL`. On a CPU Ferry's own engine runs it; where the hardware for vLLM or vllm-ascend is here, and an
    environment with it (`--engine-env`), that does. `--dry-run` says which, why, and what fits into memory.
    """

    model: Path | None = option(
        None, positional=True, help="Model directory, float or quantized, or a .gguf file (engine llamacpp)."
    )
    engine: str = option("auto", help="auto, native, vllm, vllm-ascend or llamacpp; auto goes by what is here.")
    host: str = option("127.0.0.1", min_length=1, help="Address to listen on; 0.0.0.0: all of this machine's.")
    port: int = option(8080, ge=0, le=65535, help="Port to listen on; 0: any that is free.")
    served_model_name: tuple[str, ...] = option(
        (), help="Names that requests may give as model; default: the directory's name, and its path as given."
    )
    dtype: Dtype = option("auto", metavar="TYPE", help="Type to compute in; auto: by model and hardware.")
    quantization: Quantization = option(
        "auto",
        short="-q",
        metavar="SCHEME",
        help="What the model is expected to be (smoothquant, awq, compressed-tensors, ascend, none), or w8a8: round a "
        "float model to 8 bits while it is loaded. auto: what it is.",
    )
    max_model_len: int | None = option(
        None,
        ge=1,
        unit="tokens",
        help="Longest prompt and answer together; default: the model's, or what fits.",
    )
    gpu_memory_utilization: float | None = option(
        None, gt=0, le=1, unit="share", help="Share of the accelerator's memory, or the machine's, for model and cache."
    )
    kv_cache_memory: Bytes | None = option(
        None, ge=1_000_000, unit="bytes", metavar="SIZE", aliases=("--kv-cache-memory-bytes",),
        help="Memory of the cache of keys and values, as 2GB; default: by gpu_memory_utilization.",
    )  # fmt: skip
    block_size: int | None = option(
        None, ge=1, unit="tokens", help="Tokens a block of the cache; default: the engine's (128 on Ascend)."
    )
    max_num_seqs: int = option(64, ge=1, unit="requests", help="Requests that are answered at the same time.")
    max_num_batched_tokens: int = option(
        256, ge=1, unit="tokens", help="Tokens a step: long prompts are read in parts of this size."
    )
    prefix_caching: bool = option(
        True, aliases=("--enable-prefix-caching",), help="Keep the cache of prompts for prompts that begin alike."
    )
    tensor_parallel_size: int = option(
        1, ge=1, short="-tp", unit="ranks", help="Accelerators that share each layer (vllm, vllm-ascend)."
    )
    threads: int | None = option(None, ge=1, help="Threads to compute with on a CPU; default: the cores.")
    trust_remote_code: bool = option(False, help="Run code that lies in the model's directory (vllm, vllm-ascend).")
    seed: int = option(
        0,
        ge=0,
        help="Seed of requests that give none: the same ones in the same order after a restart get the same answers "
        "(engine native).",
    )
    max_queue: int = option(
        256, ge=0, unit="answers", help="Answers that may wait; further requests are told to come back (429)."
    )
    drain_timeout: float = option(
        30.0, ge=0, unit="s", help="Time that running answers get to finish when the server is stopped."
    )
    api_key_file: Path | None = option(
        None, help="File of keys, one a line: requests must bring one of them. Default: no key is needed."
    )
    engine_env: Path | None = option(
        None, env=("FERRY_VLLM_ENV",), help="Virtual environment in which vllm or vllm-ascend is installed."
    )
    engine_args: ShellWords = option(
        "", metavar="'WORDS'", help="Further words for the engine's own command, as --engine-args='--enforce-eager'."
    )
    chat_template: Path | None = option(None, help="File to use instead of the model's chat template.")
    generation_defaults: Defaults = option(
        "auto",
        aliases=("--generation-config",),
        help="Where values that a request leaves out come from; auto: the model's generation_config.json.",
    )
    log_requests: bool = option(
        False, aliases=("--enable-log-requests",), help="Log a line a request, without its text."
    )
    limits: LimitSettings = option(LimitSettings(), help="guided_time_limit, request_timeout, max_body_bytes.")

    @model_validator(mode="after")
    def _complete(self) -> ServeConfig:
        if self.model is None:
            raise ValueError("model is missing; give MODEL or --model DIR")
        return self

    @classmethod
    def interpret(cls, layers: list[Layer]) -> list[Layer]:
        """Say of each option of vLLM that Ferry does not have what to do instead."""
        return [layer._replace(problems=tuple(map(_answered, layer.problems))) for layer in layers]

    @property
    def path(self) -> Path:
        """The model, which is always given."""
        assert self.model is not None
        return self.model

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model; the first is shown."""
        if self.served_model_name:
            return self.served_model_name
        short = self.path.resolve().name if self.path.name in ("", "..") else self.path.name
        return tuple(dict.fromkeys((short, str(self.path), str(self.path.absolute()))))


def settings_of(config: ServeConfig, log_file: Path | None = None) -> EngineSettings:
    """Return what the engine is told. A quantized model stays as it is, whatever it was expected to be."""
    from ferry.engines.engine import EngineSettings
    from ferry.engines.model_facts import is_quantized

    return EngineSettings(
        model=config.path,
        dtype=config.dtype,
        quantization="w8a8" if config.quantization == "w8a8" and not is_quantized(config.path) else "",
        max_model_len=config.max_model_len,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        prefix_caching=config.prefix_caching,
        tensor_parallel_size=config.tensor_parallel_size,
        threads=config.threads,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
        environment=config.engine_env,
        log_file=log_file,
        further=tuple(shlex.split(config.engine_args)),
    )


def _answered(problem: Problem) -> Problem:
    """Add to an unknown flag of vLLM what to do about it."""
    start = "unknown flag "
    if problem.code != "config.unknown" or not problem.text.startswith(start):
        return problem
    flag = problem.text.removeprefix(start).split(" ")[0].replace("_", "-")
    positive = flag.replace("--no-", "--", 1)
    advice = _advice().get(flag) or _advice().get(positive)
    return problem._replace(text=f"{start}{flag} of vLLM: {advice}") if advice else problem


@cache
def _advice() -> dict[str, str]:
    text = files("ferry.verbs.serve").joinpath("vllm_options.csv").read_text(encoding="utf-8")
    return {row["option"]: row["instead"] for row in csv.DictReader(text.splitlines())}
