"""vllm-ascend, the plugin that makes vLLM run on Ascend NPUs. Not run on such a machine yet: its command line and its
requests are compared with recorded ones only."""

from __future__ import annotations

from dataclasses import replace

from ferry.engines import vllm_judgement as judgement
from ferry.engines.engine import Engine, EngineKind, EngineSettings, Verdict
from ferry.engines.hardware import Place, ascend

NAME = "vllm-ascend"
BLOCK_SIZE = 128
"""Tokens of a block that the kernels of NPUs are made for."""


def with_defaults(settings: EngineSettings) -> EngineSettings:
    """Return settings with what suits NPUs where nothing was said."""
    return settings if settings.block_size is not None else replace(settings, block_size=BLOCK_SIZE)


def _available(settings: EngineSettings) -> Verdict:
    found = judgement.installed(settings, NAME, ascend().num_devices)
    if isinstance(found, Verdict):
        return found
    if not found.vllm_ascend:
        return Verdict(False, f"{found.directory} has vllm without vllm-ascend: DIR/bin/pip install vllm-ascend")
    if not ascend().num_devices:
        return Verdict(False, f"{found.described} needs an Ascend NPU, and none is here (/dev/davinci*)")
    return Verdict(True, found.described)


def _runs(settings: EngineSettings) -> Verdict:
    return judgement.runs(settings, judgement.environment(settings, NAME), NAME, ascend())


def _wanted(settings: EngineSettings) -> Verdict:
    number = ascend().num_devices
    are = "s are" if number > 1 else " is"
    return Verdict(True, f"{number} Ascend NPU{are} here, and {judgement.environment(settings, NAME).described}")


def _place(settings: EngineSettings) -> Place:
    return judgement.place(settings, NAME, ascend())


def _make(settings: EngineSettings) -> Engine:
    return judgement.make(NAME, with_defaults(settings), ascend())


ENGINE = EngineKind(
    name=NAME,
    rank=10,
    summary="vLLM with vllm-ascend in an environment of its own: Ascend NPUs",
    available=_available,
    runs=_runs,
    make=_make,
    options=frozenset({"quantization", "threads"}),
    wanted=_wanted,
    place=_place,
)
