"""Ferry's own engine: any causal model of Hugging Face on this machine's processor. It lives in a process of its own,
so that a crash takes neither the server nor the next request with it. No torch here.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from ferry.engines.engine import Engine, EngineKind, EngineSettings, Verdict

NEEDED = ("torch", "transformers", "llguidance", "tokenizers")


def _available(settings: EngineSettings) -> Verdict:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return Verdict(False, f"{', '.join(missing)} is not installed: pip install 'llmferry[serve]'")
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
    return Verdict(True, "it runs Hugging Face directories on the processor")


def _make(settings: EngineSettings) -> Engine:
    from ferry.engines.native.parent import ChildEngine

    return ChildEngine(settings)


ENGINE = EngineKind(
    name="native",
    rank=50,
    summary="Ferry's own: torch, paged cache, continuous batching, W8A8",
    available=_available,
    runs=_runs,
    make=_make,
    options=frozenset({"tensor_parallel_size", "environment", "further"}),
)
