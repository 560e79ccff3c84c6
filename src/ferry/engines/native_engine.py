"""Ferry's own engine: any causal model of Hugging Face on this machine's processor. It lives in a process of its own,
so that a crash takes neither the server nor the next request with it. No torch here.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from ferry.core.errors import FerryError
from ferry.engines.engine import Engine, EngineKind, EngineSettings, Verdict
from ferry.engines.hardware import KERNELS_BYTES, Place, machine

NEEDED = ("llguidance", "tokenizers")
FOR_OTHER_MODELS = ("torch", "transformers")
"""Needed for models that the kernels do not run."""
WITH_TORCH = "pip install 'llmferry[serve,train]'"


def _available(settings: EngineSettings) -> Verdict:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        remedy = "pip install 'llmferry[serve]'"
        return Verdict(False, f"{', '.join(missing)} is not installed: {remedy}", remedy)
    return Verdict(True, "its packages are installed")


def _runs(settings: EngineSettings) -> Verdict:
    path = settings.model / "config.json"
    if not path.is_file():
        return Verdict(False, f"{settings.model} has no config.json: it reads Hugging Face directories")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return Verdict(False, f"{path} is not JSON")
    if config.get("is_encoder_decoder"):
        return Verdict(False, "an encoder with a decoder is not a causal model")
    if not any(settings.model.glob("*.safetensors")):
        return Verdict(False, f"{settings.model} has no weights in safetensors: `ferry convert` makes some")
    try:
        reason = _why_not_kernels(settings)
    except FerryError as error:  # incomplete weights, a quantization that Ferry does not read
        return Verdict(False, str(error))
    if not reason:
        return Verdict(True, "its kernels run this model")
    missing = [name for name in FOR_OTHER_MODELS if find_spec(name) is None]
    if missing:
        return Verdict(False, f"{reason}; {' and '.join(missing)} would be needed: {WITH_TORCH}", WITH_TORCH)
    return Verdict(True, f"transformers computes it: {reason}")


def _widens(settings: EngineSettings) -> bool:
    return not _why_not_kernels(settings)


def _place(settings: EngineSettings) -> Place:
    return machine(KERNELS_BYTES) if _widens(settings) else machine()


def _why_not_kernels(settings: EngineSettings) -> str:
    from ferry.engines.native.fast import why_not

    return why_not(settings)


def _make(settings: EngineSettings) -> Engine:
    from ferry.engines.native.parent import ChildEngine

    return ChildEngine(settings)


ENGINE = EngineKind(
    name="native",
    rank=50,
    summary="Ferry's own: paged cache, continuous batching, W8A8; own kernels, or transformers",
    available=_available,
    runs=_runs,
    make=_make,
    options=frozenset({"tensor_parallel_size", "environment", "further"}),
    place=_place,
    widens=_widens,
)
