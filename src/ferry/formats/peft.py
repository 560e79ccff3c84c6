"""The tensors of a LoRA adapter as PEFT keeps them, read without PEFT and without torch.

A module's weight W [O, I] becomes W + scale * B @ A with A [R, I] and B [O, R]. Opening reads headers only and accounts
for every tensor: each is the A or the B of a module that the config names, of the rank that the config gives it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ferry.core.dtypes import num_bytes
from ferry.core.errors import InputError, IntegrityError
from ferry.core.family import Model
from ferry.core.floats import FLOATS, Float32, to_float32
from ferry.core.manifest import Manifest
from ferry.core.safetensors import read_header
from ferry.formats.fingerprint import damaged_files, manifest_of
from ferry.formats.peft_config import CONFIG, AdapterConfig, read_config
from ferry.formats.pickles import TensorRef
from ferry.formats.torch_zip import check_crcs, open_torch

WEIGHTS = "adapter_model.safetensors"
BIN_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
KIND = "peft-adapter"
"""What the manifest of an adapter says it is."""
_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")


class Stored(NamedTuple):
    """A matrix of an adapter as it lies in a file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> bytes:
        size = num_bytes(self.dtype, self.shape)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(size)
        if len(data) != size:
            raise IntegrityError(f"{self.path} ends inside {self.name}", code="lora.damaged", repair="copy it again")
        return data

    def values(self) -> Float32:
        return to_float32(np.frombuffer(self.read(), np.uint8), self.dtype).reshape(self.shape)


class Pair(NamedTuple):
    """The two matrices of one module: A [R, I] and B [O, R]."""

    a: Stored
    b: Stored


class Factors(NamedTuple):
    """The same, read: W [O, I] becomes W + scale * b_OR @ a_RI."""

    a_RI: Float32
    b_OR: Float32


@dataclass(frozen=True)
class Adapter:
    """An adapter opened for reading. `modules` are names of the base model, in the order of their names."""

    directory: Path
    config: AdapterConfig
    modules: Mapping[str, Pair]
    manifest: Manifest | None
    """None where it was not made by Ferry."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the adapter itself calls modules that the model's files name otherwise."""

    @property
    def base_sha256(self) -> str:
        """Return the fingerprint of the model it was trained on, or "" where it was not recorded."""
        details = self.manifest.details if self.manifest else {}
        return str(details.get("base", {}).get("model_sha256", ""))

    @property
    def base_name(self) -> str:
        details = self.manifest.details if self.manifest else {}
        return str(details.get("base", {}).get("name") or self.config.base_model_name_or_path or "another model")

    def scale(self, module: str) -> float:
        return self.config.scale(self.names.get(module, module))

    def read(self, module: str) -> Factors:
        """Return the two matrices of a module as float32."""
        pair = self.modules[module]
        return Factors(pair.a.values(), pair.b.values())


def open_adapter(directory: Path) -> Adapter:
    """Open an adapter directory from headers alone; refuse what is incomplete or more than plain LoRA."""
    config = read_config(directory / CONFIG)
    pairs = _pair_up(_find_tensors(directory), directory)
    for module, pair in pairs.items():
        _check_pair(config, module, pair, directory)
    manifest = manifest_of(directory)
    return Adapter(directory, config, pairs, manifest if manifest and manifest.kind == KIND else None)


def in_memory(model: Model, name: str) -> str:
    """Return what PEFT calls a tensor or module: its name in the model that transformers makes."""
    in_files, made = model.family.vision.decoder if model.family.vision is not None else ("", "")
    return made + name.removeprefix(in_files) if name.startswith(in_files) else name


def named_for(adapter: Adapter, model: Model) -> Adapter:
    """Return an adapter whose modules have the names of a model's files."""
    in_files, made = model.family.vision.decoder if model.family.vision is not None else ("", "")
    names = {in_files + name.removeprefix(made): name for name in adapter.modules if name.startswith(made)}
    modules = {name: adapter.modules[own] for name, own in names.items()}
    strangers = {name: pair for name, pair in adapter.modules.items() if not name.startswith(made)}
    return replace(adapter, modules={**modules, **strangers}, names=names)


def is_adapter(directory: Path) -> bool:
    """Say whether a directory looks like an adapter: it has the config of one and none of a model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def check_intact(adapter: Adapter) -> None:
    """Read an adapter that Ferry made, or a torch file, and compare it with its digests or CRCs."""
    damaged = damaged_files(adapter.directory, adapter.manifest) if adapter.manifest else []
    if damaged:
        raise IntegrityError(
            f"{adapter.directory}: {', '.join(damaged)} changed since the adapter was made",
            code="lora.damaged",
            repair="copy or make the adapter again",
        )
    for path in {stored.path for pair in adapter.modules.values() for stored in pair if stored.path.suffix == ".bin"}:
        check_crcs(open_torch(path))


def check_base(adapter: Adapter, found_sha256: str, where: str) -> None:
    """Refuse a base model other than the one the adapter was trained on, where that was recorded."""
    if adapter.base_sha256 and adapter.base_sha256 != found_sha256:
        raise IntegrityError(
            f"{adapter.directory} was trained on {adapter.base_name} (sha256 {adapter.base_sha256[:12]}), "
            f"{where} is another model (sha256 {found_sha256[:12]})",
            code="lora.base",
            repair=f"give {adapter.base_name}, in any layout",
        )


def check_fits(adapter: Adapter, model: Model, where: str) -> None:
    """Refuse an adapter whose modules are not in the model, or have other sizes there."""
    shapes = model.canonical()
    strangers, misfits = [], []
    for module, pair in adapter.modules.items():
        shape = shapes.get(f"{module}.weight")
        fits = (pair.b.shape[0], pair.a.shape[1])
        if shape is None or len(shape) != 2:
            strangers.append(module)
        elif shape != fits:
            misfits.append(f"{module} {list(fits)}, expected {list(shape)}")
    complaints = [
        f"{len(names)} of its modules {word}: {shortened(names)}"
        for word, names in (("are not there", strangers), ("have another shape", misfits))
        if names
    ]
    if complaints:
        raise InputError(
            f"{adapter.directory} does not fit {where} ({model.family.name}): {'; '.join(complaints)}",
            code="lora.fit",
            repair=f"give the model it was trained on: {adapter.base_name}",
        )


def shortened(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (" ..." if len(names) > shown else "")


def _find_tensors(directory: Path) -> list[Stored]:
    path = directory / WEIGHTS
    if path.is_file():
        entries = read_header(path).tensors
        return [Stored(name, path, entry.dtype, entry.shape, entry.start) for name, entry in entries.items()]
    path = directory / BIN_WEIGHTS
    if not path.is_file():
        raise InputError(f"{directory} has neither {WEIGHTS} nor {BIN_WEIGHTS}", code="lora.no-weights")
    archive = open_torch(path)
    if not isinstance(archive.structure, dict):
        raise InputError(f"{path} does not hold a dictionary of tensors", code="lora.tensors")
    found = []
    for name, tensor in archive.structure.items():
        if not isinstance(tensor, TensorRef):
            raise InputError(f"{path}: {name} is {tensor!r}, expected a tensor", code="lora.tensors")
        extent = archive.extent(name, tensor)
        found.append(Stored(name, path, extent.dtype, extent.shape, extent.offset))
    return found


def _pair_up(tensors: Sequence[Stored], directory: Path) -> dict[str, Pair]:
    """Return the matrices by module; every tensor must be one of a pair."""
    found: dict[str, dict[str, Stored]] = {}
    strangers = []
    for stored in tensors:
        match = _TENSOR.fullmatch(stored.name)
        matrices = found.setdefault(match["module"], {}) if match else {}
        if match is None or match["matrix"] in matrices:
            strangers.append(stored.name)
        else:
            matrices[match["matrix"]] = stored
    widows = [module for module, matrices in found.items() if len(matrices) < 2]
    complaints = [f"unknown: {shortened(sorted(strangers))}"] if strangers else []
    complaints += [f"A without B, or B without A: {shortened(sorted(widows))}"] if widows else []
    if complaints or not found:
        raise InputError(
            f"{directory} is not a complete LoRA adapter; tensors {'; '.join(complaints) or 'none'}",
            code="lora.tensors",
            repair=f"expected {PREFIX}MODULE.lora_A.weight and lora_B.weight for every module: save it again",
        )
    return {module: Pair(found[module]["A"], found[module]["B"]) for module in sorted(found)}


def _check_pair(config: AdapterConfig, module: str, pair: Pair, directory: Path) -> None:
    rank = config.rank_of(module)
    if not (len(pair.a.shape) == len(pair.b.shape) == 2 and pair.a.shape[0] == pair.b.shape[1] == rank):
        raise InputError(
            f"{directory}: A {list(pair.a.shape)} and B {list(pair.b.shape)} of {module} are not of rank {rank}, "
            f"as {CONFIG} says",
            code="lora.rank",
            repair="the two files belong to different adapters, or were saved from single ranks: save it again",
        )
    if not {pair.a.dtype, pair.b.dtype} <= set(FLOATS):
        raise InputError(
            f"{directory}: {module} is {pair.a.dtype} and {pair.b.dtype}, expected {' or '.join(FLOATS)}",
            code="lora.dtype",
        )
    if not config.is_target(module):
        raise InputError(
            f"{directory} has tensors of {module}, which target_modules {config.targets!r} of {CONFIG} leaves out",
            code="lora.targets",
            repair="the two files belong to different adapters: save it again",
        )
