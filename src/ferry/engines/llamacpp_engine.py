"""llama.cpp, from the package xllamacpp: GGUF files on a CPU, small in memory and quick for one user.

Its build has llguidance, so constraints are the same as everywhere. What it does not have (log probabilities of
prompts, penalties of the answer alone, `min_tokens`) is refused by name.
"""

from __future__ import annotations

from importlib.util import find_spec

from ferry.engines.engine import Engine, EngineKind, EngineSettings, Verdict
from ferry.engines.hardware import Place, machine

RESERVE_BYTES = 250_000_000
"""What the process takes besides weights and cache (measured)."""


def _available(settings: EngineSettings) -> Verdict:
    missing = [name for name in ("xllamacpp", "httpx", "gguf", "tokenizers") if find_spec(name) is None]
    if missing:
        way = "pip install 'llmferry[llamacpp]'"
        is_its_own = settings.model.suffix == ".gguf"
        return Verdict(False, f"{', '.join(missing)} is not installed: {way}", way if is_its_own else "")
    return Verdict(True, "xllamacpp is installed")


def _runs(settings: EngineSettings) -> Verdict:
    if settings.model.suffix != ".gguf":
        return Verdict(False, "it reads .gguf files only")
    return Verdict(True, "it reads .gguf files")


def _place(settings: EngineSettings) -> Place:
    return machine(RESERVE_BYTES, unpacks=False)


def _make(settings: EngineSettings) -> Engine:
    from ferry.engines.llamacpp_process import LlamacppEngine

    return LlamacppEngine(settings, _place(settings))


ENGINE = EngineKind(
    name="llamacpp",
    rank=60,
    summary="llama.cpp in a process of its own: GGUF files on a CPU",
    available=_available,
    runs=_runs,
    make=_make,
    options=frozenset({"quantization", "dtype", "block_size", "tensor_parallel_size", "further"}),
    place=_place,
)
