"""vLLM, on NVIDIA GPUs, or its build for CPUs where somebody asks for it."""

from __future__ import annotations

from ferry.engines import vllm_judgement as judgement
from ferry.engines.engine import Engine, EngineKind, EngineSettings, Verdict
from ferry.engines.hardware import Place, nvidia

NAME = "vllm"


def _available(settings: EngineSettings) -> Verdict:
    found = judgement.installed(settings, NAME, nvidia().num_devices)
    if isinstance(found, Verdict):
        return found
    if found.vllm_ascend:
        return Verdict(False, f"{found.described} is for --engine vllm-ascend")
    if not found.is_for_cpu and not nvidia().num_devices:
        return Verdict(False, f"{found.described} is a build for GPUs, and no NVIDIA GPU is here")
    return Verdict(True, found.described)


def _runs(settings: EngineSettings) -> Verdict:
    found = judgement.environment(settings, NAME)
    kind = "vllm-cpu" if found.is_for_cpu else "vllm-cuda"
    return judgement.runs(settings, found, kind, nvidia())


def _wanted(settings: EngineSettings) -> Verdict:
    found = judgement.environment(settings, NAME)
    if found.is_for_cpu:
        return Verdict(False, "its build for CPUs starts more slowly and is slower there (--engine vllm takes it)")
    number = nvidia().num_devices
    return Verdict(True, f"{number} NVIDIA GPU{'s are' if number > 1 else ' is'} here, and {found.described}")


def _place(settings: EngineSettings) -> Place:
    return judgement.place(settings, NAME, nvidia())


def _make(settings: EngineSettings) -> Engine:
    return judgement.make(NAME, settings, nvidia())


ENGINE = EngineKind(
    name=NAME,
    rank=20,
    summary="vLLM in an environment of its own: NVIDIA GPUs, several of them",
    available=_available,
    runs=_runs,
    make=_make,
    options=frozenset({"quantization"}),
    wanted=_wanted,
    place=_place,
)
