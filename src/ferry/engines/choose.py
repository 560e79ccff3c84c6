"""Which engine runs a model here, and why each of the others does not.

An engine is asked four things in turn: is it here, does it run this model, does it follow the options that were given,
and, where nobody named it, is it the one to take. The first answer that is no is its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from ferry.core.errors import ConfigError, UnavailableError
from ferry.engines.engine import EngineKind, EngineSettings, Verdict, find, kinds

AUTO = "auto"
FLAGS = {"kv_cache_memory_bytes": "--kv-cache-memory", "further": "--engine-args"}
"""Flags that are not called like their field."""
NOT_ASKED_FOR = frozenset({"model", "environment", "log_file", "seed"})
"""Fields that are no wish: an environment may be named for all models, and used for some."""


class Choice(NamedTuple):
    """An engine, and what was found out about every one that was looked at, by name."""

    kind: EngineKind
    candidates: list[tuple[str, Verdict]]

    @property
    def reason(self) -> str:
        """Say why this one."""
        return dict(self.candidates)[self.kind.name].reason

    def sentences(self) -> tuple[str, ...]:
        """Return one sentence an engine, the chosen one first."""
        others = [(name, verdict) for name, verdict in self.candidates if name != self.kind.name]
        said = [f"engine: {self.kind.name}, because {self.reason}" if self.reason else f"engine: {self.kind.name}"]
        return tuple(said + [f"not {name}: {verdict.reason}" for name, verdict in others])


def choose(name: str, settings: EngineSettings, known: Mapping[str, EngineKind] | None = None) -> Choice:
    """Return the engine of this name, or with `auto` the first that can run the model here; refuse with the reason."""
    if name != AUTO:
        kind = find(name) if known is None else known[name]
        return Choice(kind, [(kind.name, _insist(kind, settings))])
    candidates: list[tuple[str, Verdict]] = []
    stages: list[int] = []
    chosen: EngineKind | None = None
    for kind in (kinds() if known is None else known).values():
        stage, verdict = _judge(kind, settings)
        if chosen is not None and verdict.usable:
            verdict = Verdict(False, f"it would run too; {chosen.name} comes first (--engine {kind.name} takes it)")
        elif verdict.usable:
            chosen = kind
        candidates.append((kind.name, verdict))
        stages.append(stage)
    if chosen is None:
        raise _none(settings, candidates, stages)
    return Choice(chosen, candidates)


def not_followed(kind: EngineKind, settings: EngineSettings) -> list[str]:
    """Return the flags that were given and that an engine does not follow."""
    return [
        FLAGS.get(name, f"--{name.replace('_', '-')}")
        for name, default in _defaults().items()
        if name in kind.options and name not in NOT_ASKED_FOR and getattr(settings, name) != default
    ]


def _judge(kind: EngineKind, settings: EngineSettings) -> tuple[int, Verdict]:
    """Return the verdict, and how many questions were answered with yes."""
    here = kind.available(settings)
    if not here.usable:
        return 0, here
    runs = kind.runs(settings)
    if not runs.usable:
        return 1, runs
    ignored = not_followed(kind, settings)
    if ignored:
        words = ", ".join(ignored)
        return 2, Verdict(False, f"it does not have {words}", f"leave {words} out")
    wanted = kind.wanted(settings)
    if not wanted.usable:
        return 3, wanted._replace(remedy=f"--engine {kind.name}")
    return 4, Verdict(True, wanted.reason or runs.reason or here.reason)


def _none(settings: EngineSettings, candidates: list[tuple[str, Verdict]], stages: list[int]) -> UnavailableError:
    """Return the refusal where no engine can: one a line, first what is mended most easily."""
    found = sorted(zip(candidates, stages, strict=True), key=lambda each: (not each[0][1].remedy, -each[1]))
    listed = "\n  ".join(f"{name}: {verdict.reason}" for (name, verdict), _ in found)
    remedy = found[0][0][1].remedy
    likely = f"most likely: {remedy}; else " if remedy else ""
    return UnavailableError(
        f"no engine here runs {settings.model}\n  {listed}",
        code="engine.none",
        repair=f"{likely}do what one of them says, or pull the model in another form",
    )


def _insist(kind: EngineKind, settings: EngineSettings) -> Verdict:
    """Return the verdict of an engine that was asked for by name; raise where it cannot be."""
    here = kind.available(settings)
    if not here.usable:
        raise UnavailableError(
            f"engine {kind.name} cannot be used here: {here.reason}",
            code="engine.unavailable",
            repair="or leave --engine out: auto takes what is here",
        )
    runs = kind.runs(settings)
    if not runs.usable:
        raise ConfigError(
            f"engine {kind.name} does not run {settings.model}: {runs.reason}",
            code="engine.model",
            repair="or leave --engine out: auto takes one that does",
        )
    ignored = not_followed(kind, settings)
    if ignored:
        raise ConfigError(
            f"engine {kind.name} does not have {', '.join(ignored)}",
            code="engine.option",
            repair=f"leave {'it' if len(ignored) == 1 else 'them'} out, or use another --engine",
        )
    return Verdict(True, "it was asked for by name")


def _defaults() -> dict[str, Any]:
    return {each.name: each.default for each in fields(EngineSettings) if each.default is not MISSING}
