"""Prompts of ten thousand tokens beside short streams, and prompts that are too long for the model."""

from __future__ import annotations

import asyncio

import pytest

from load.asking import CHAT, COMPLETIONS, error_of, plain, stream, talk
from load.conftest import Serve
from load.serving import until
from load.small_model import LONGEST

LONG = 10_000


def tokens(number: int, first: int = 0) -> list[int]:
    """Return a prompt of so many tokens, different for each `first`."""
    return [100 + (first * 7919 + place * 31) % 40_000 for place in range(number)]


@pytest.mark.slow
def test_streams_go_on_while_prompts_of_ten_thousand_tokens_are_read(serve: Serve) -> None:
    server = serve(cache="64MB").ready()

    async def story() -> None:
        async with server.client() as client:
            alone = (await client.post(COMPLETIONS, json={**plain(max_tokens=8), "prompt": tokens(LONG)})).json()
            right = await stream(client, plain("Beside", 900))
            # A long prompt alone takes so many steps; between two of them others get a token.
            begun = [asyncio.Event() for _ in range(3)]
            beside = [
                asyncio.create_task(stream(client, plain("Beside", 900), on_event=lambda _, one=one: one.set()))
                for one in begun
            ]
            await asyncio.gather(*(one.wait() for one in begun))
            before = server.metrics()
            long = [
                asyncio.create_task(stream(client, {**plain(max_tokens=8), "prompt": tokens(LONG, first)}))
                for first in range(1, 4)
            ]
            long_found = await asyncio.gather(*long)
            first_s = min(one.times_s[0] for one in long_found)
            for one in await asyncio.gather(*beside):
                assert one.is_done
                assert one.text == right.text
                num_meanwhile = sum(time_s < first_s for time_s in one.times_s)
                # 512 tokens a step: ten thousand of them are some twenty steps, and the three share them.
                assert num_meanwhile >= LONG // 512
                # None of them waited for a whole prompt.
                assert one.longest_pause_s < (long_found[-1].times_s[0] - one.times_s[0]) / 4
            for one in long_found:
                assert one.is_done
                assert one.usage is not None
                assert one.usage["prompt_tokens"] == LONG
            steps = server.metrics().sum("ferry_engine_steps_total") - before.sum("ferry_engine_steps_total")
            assert steps >= 3 * LONG // 512
            # The first prompt again, out of the cache: the same answer.
            again = (await client.post(COMPLETIONS, json={**plain(max_tokens=8), "prompt": tokens(LONG)})).json()
            assert again["choices"][0]["text"] == alone["choices"][0]["text"]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > LONG - 100

    asyncio.run(story())
    server.rest()
    assert server.end()[0] == 0


@pytest.mark.slow
def test_prompts_that_are_too_long_are_refused_with_the_limit_and_disturb_no_one(serve: Serve) -> None:
    server = serve().ready()

    async def story() -> None:
        async with server.client() as client:
            begun = asyncio.Event()
            running = asyncio.create_task(stream(client, plain(max_tokens=300), on_event=lambda _: begun.set()))
            await begun.wait()
            for path, body in (
                (COMPLETIONS, {**plain(), "prompt": tokens(LONGEST)}),
                (COMPLETIONS, plain("word " * (2 * LONGEST))),
                (CHAT, talk("word " * (2 * LONGEST), stream=True)),
                (COMPLETIONS, {**plain(max_tokens=LONGEST), "prompt": tokens(10)}),
            ):
                answer = await client.post(path, json=body)
                assert answer.status_code == 400
                error = error_of(answer.json())
                assert f"{LONGEST:,}" in error["message"].replace(str(LONGEST), f"{LONGEST:,}")
            assert (await running).is_done

    asyncio.run(story())
    server.rest()


@pytest.mark.slow
def test_a_long_prompt_that_is_cancelled_while_it_is_read_leaves_its_blocks_free(serve: Serve) -> None:
    server = serve(cache="64MB").ready()

    async def story() -> None:
        async with server.client() as client:
            for first in range(3):
                body = {**plain(max_tokens=8), "prompt": tokens(LONG, first)}
                asking = asyncio.create_task(client.post(COMPLETIONS, json=body))
                await until(lambda: server.metrics().sum("ferry_engine_running") == 1)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                await until(lambda: server.metrics().sum("ferry_kv_cache_used_ratio") == 0)

    asyncio.run(story())
    assert server.rest().sum("ferry_answers_cut_total") == 3
