"""Which engine is taken, and that every other one says why it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferry.core.errors import ConfigError, UnavailableError
from ferry.engines.choose import choose, not_followed
from ferry.engines.engine import Engine, EngineKind, EngineSettings, Verdict, kinds

YES = Verdict(True, "it is here")
SETTINGS = EngineSettings(Path("model"))


def never(settings: EngineSettings) -> Engine:
    raise AssertionError("choosing makes nothing")


def kind(name: str, rank: int, **verdicts: Any) -> EngineKind:
    answers = {key: (lambda settings, said=value: said) for key, value in verdicts.items() if key != "options"}
    given = {"available": lambda settings: YES, "runs": lambda settings: Verdict(True, "it runs it"), **answers}
    return EngineKind(name, rank, name, make=never, options=verdicts.get("options", frozenset()), **given)


def among(*found: EngineKind) -> dict[str, EngineKind]:
    return {each.name: each for each in found}


def test_the_first_that_can_is_taken_and_each_other_says_why_not() -> None:
    known = among(
        kind("a", 1, available=Verdict(False, "a is not installed")),
        kind("b", 2, runs=Verdict(False, "b reads other files")),
        kind("c", 3, wanted=Verdict(False, "c is slow here")),
        kind("d", 4),
        kind("e", 5),
    )
    choice = choose("auto", SETTINGS, known)
    assert choice.kind.name == "d"
    assert choice.sentences() == (
        "engine: d, because it runs it",
        "not a: a is not installed",
        "not b: b reads other files",
        "not c: c is slow here",
        "not e: it would run too; d comes first (--engine e takes it)",
    )


def test_auto_passes_over_an_engine_that_would_ignore_what_was_asked_for() -> None:
    known = among(kind("a", 1, options=frozenset({"block_size"})), kind("b", 2))
    assert choose("auto", SETTINGS, known).kind.name == "a"
    choice = choose("auto", EngineSettings(Path("model"), block_size=128), known)
    assert choice.kind.name == "b"
    assert "not a: it does not have --block-size" in choice.sentences()


def test_an_engine_that_was_named_is_taken_even_where_auto_would_not() -> None:
    known = among(kind("slow", 1, wanted=Verdict(False, "it is slow")))
    assert choose("slow", SETTINGS, known).kind.name == "slow"


def test_an_engine_that_was_named_and_cannot_be_is_refused_with_its_reason() -> None:
    known = among(
        kind("a", 1, available=Verdict(False, "a is not installed")),
        kind("b", 2, runs=Verdict(False, "b reads other files")),
        kind("c", 3, options=frozenset({"kv_cache_memory_bytes"})),
    )
    with pytest.raises(UnavailableError, match="a is not installed"):
        choose("a", SETTINGS, known)
    with pytest.raises(ConfigError, match="b reads other files"):
        choose("b", SETTINGS, known)
    with pytest.raises(ConfigError, match="--kv-cache-memory"):
        choose("c", EngineSettings(Path("model"), kv_cache_memory_bytes=1), known)


def test_where_none_can_each_reason_is_a_line_and_what_is_mended_most_easily_comes_first() -> None:
    known = among(
        kind("far", 1, available=Verdict(False, "not here")),
        kind("near", 2, runs=Verdict(False, "it lacks a package", "install the package")),
        kind("nearer", 3, options=frozenset({"block_size"})),
        kind("other", 4, runs=Verdict(False, "it reads other files")),
    )
    with pytest.raises(UnavailableError) as caught:
        choose("auto", EngineSettings(Path("model"), block_size=128), known)
    assert caught.value.message.splitlines() == [
        "no engine here runs model",
        "  nearer: it does not have --block-size",
        "  near: it lacks a package",
        "  other: it reads other files",
        "  far: not here",
    ]
    assert caught.value.repair.startswith("most likely: leave --block-size out; else ")
    with pytest.raises(UnavailableError, match="; do what one of them says"):
        choose("auto", SETTINGS, {"far": known["far"]})


def test_an_unknown_engine_is_named_with_the_nearest() -> None:
    with pytest.raises(UnavailableError, match="did you mean 'vllm'"):
        choose("vlm", SETTINGS)


def test_accelerators_come_before_the_cpu_and_defaults_are_no_wishes() -> None:
    known = kinds()
    assert list(known) == ["vllm-ascend", "vllm", "native", "llamacpp"]
    assert [not_followed(each, SETTINGS) for each in known.values()] == [[], [], [], []]
