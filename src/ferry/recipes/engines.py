"""Which engine runs which quantized model, as data: `engines.csv`.

A line says for one engine, format and scheme whether it runs, under which condition, and how that is known: `measured`
with this project, or `read` in the engine's source or documents. What is not in the table is unknown.
"""

from __future__ import annotations

import csv
import platform
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

Source = Literal["measured", "read"]
RUNS: dict[str, bool | None] = {"yes": True, "no": False, "unknown": None}
CPU_FEATURES = {"AVX512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "AVX2": {"avx2", "fma"}}
"""The instruction sets that engines have binaries for, the best first, and the flags that mean them."""


class Verdict(NamedTuple):
    """Whether an engine runs a model under a condition ("" = always). `runs` is None where nobody knows.

    `here` says whether the condition holds on this machine: None where this machine cannot tell.
    """

    engine: str
    condition: str
    runs: bool | None
    note: str
    source: Source
    here: bool | None = None

    @property
    def text(self) -> str:
        """Return one line for people."""
        word = {True: "runs", False: "does not run", None: "not known"}[self.runs]
        condition = f" ({self.condition})" if self.condition else ""
        return f"{self.engine}{condition}: {word}{f': {self.note}' if self.note else ''}"


class _Line(NamedTuple):
    format: str
    scheme: str
    activations: str
    """`token` or `tensor`; "" = both."""
    machine: str
    """What the condition asks of a machine: `cpu:AVX2`, `cc:7.5:10` (at least, below), or "" = no machine tells."""
    verdict: Verdict


def engine_names() -> tuple[str, ...]:
    """Return every engine of the table."""
    return tuple(dict.fromkeys(line.verdict.engine for line in _lines()))


def verdicts(format: str, scheme_name: str, activations: str = "") -> tuple[Verdict, ...]:
    """Return what is known about a format and a scheme (W8A8, W4A16), engine by engine.

    `activations` narrows it to one scale a `token` or a `tensor`.
    """
    return tuple(line.verdict for line in _fitting(format, scheme_name, activations))


def verdicts_here(
    format: str,
    scheme_name: str,
    activations: str = "",
    *,
    cpu: str | None = None,
    capability: float | None = None,
) -> tuple[Verdict, ...]:
    """Return the same with `here` filled in: by this machine's CPU, and the accelerator's capability where known."""
    level = cpu_level() if cpu is None else cpu
    return tuple(
        line.verdict._replace(here=_holds(line.machine, level, capability))
        for line in _fitting(format, scheme_name, activations)
    )


def runnable(engine: str, cpu: str) -> tuple[tuple[str, str], ...]:
    """Return the formats and schemes that an engine runs on a CPU of a level, or may run where only others can tell."""
    found = [
        (line.format, line.scheme)
        for line in _lines()
        if line.verdict.engine == engine and line.verdict.runs and _holds(line.machine, cpu, None) is not False
    ]
    return tuple(dict.fromkeys(found))


@cache
def cpu_features() -> frozenset[str]:
    """Return what an x86 processor can do, in the words of Linux; nothing for other machines."""
    path = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not path.exists():
        return frozenset()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


@cache
def cpu_level() -> str:
    """Return the best instruction set of this machine that engines have a binary for: AVX512, AVX2 or ""."""
    return next((level for level, needed in CPU_FEATURES.items() if needed <= cpu_features()), "")


def _holds(machine: str, level: str, capability: float | None) -> bool | None:
    kind, _, rest = machine.partition(":")
    if not kind:
        return True
    if kind == "cpu":
        return level == rest
    if capability is None:
        return None
    low, _, high = rest.partition(":")
    return float(low) <= capability and (not high or capability < float(high))


def _fitting(format: str, scheme_name: str, activations: str) -> list[_Line]:
    return [
        line
        for line in _lines()
        if (line.format, line.scheme) == (format, scheme_name)
        and (not activations or line.activations in ("", activations))
    ]


@cache
def _lines() -> tuple[_Line, ...]:
    text = files("ferry.recipes").joinpath("engines.csv").read_text(encoding="utf-8")
    return tuple(_line(row) for row in csv.DictReader(text.splitlines()))


def _line(row: dict[str, str]) -> _Line:
    source: Source = "measured" if row["source"] == "measured" else "read"
    assert row["source"] == source, row
    verdict = Verdict(row["engine"], row["condition"], RUNS[row["runs"]], row["note"], source)
    return _Line(row["format"], row["scheme"], row["activations"], row["machine"], verdict)
