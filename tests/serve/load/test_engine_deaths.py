"""The engine's process is killed, again and again, and stopped: who waits is told, and what comes after is right."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import pytest

from load.asking import CHAT, COMPLETIONS, Streamed, error_of, plain, stream, talk, text_of
from load.conftest import Serve
from load.serving import Server, is_alive, is_ready, until

LOST = {"engine.lost", "engine.not-ready"}
LONG = 4000


async def streams_under_way(client: httpx.AsyncClient, number: int) -> list[asyncio.Task[Streamed]]:
    """Return streams that have all begun."""
    begun = [asyncio.Event() for _ in range(number)]

    def start(index: int) -> asyncio.Task[Streamed]:
        body = plain(f"Stream {index}", LONG)
        return asyncio.create_task(stream(client, body, on_event=lambda _: begun[index].set()))

    tasks = [start(index) for index in range(number)]
    await asyncio.gather(*(one.wait() for one in begun))
    return tasks


def kill_engine(server: Server, signum: int = signal.SIGKILL) -> int:
    engine_id = server.engine_id
    assert engine_id
    os.kill(engine_id, signum)
    return engine_id


def test_a_killed_engine_ends_its_streams_with_an_error_and_the_next_answers_are_right(serve: Serve) -> None:
    server = serve().ready()

    async def story() -> None:
        async with server.client() as client:
            right = text_of(await client.post(COMPLETIONS, json=plain()))
            tasks = await streams_under_way(client, 3)
            kill_engine(server)
            for found in await asyncio.gather(*tasks):
                assert found.error is not None
                assert [found.error["code"], found.is_done] == ["engine.lost", False]
            await until(lambda: is_ready(server.url))
            assert text_of(await client.post(COMPLETIONS, json=plain())) == right

    asyncio.run(story())
    assert server.end()[0] == 0


@pytest.mark.slow
def test_an_engine_killed_under_fifty_streams_three_times_in_a_row_comes_back_each_time(serve: Serve) -> None:
    server = serve().ready()

    async def story() -> None:
        async with server.client() as client:
            right = text_of(await client.post(CHAT, json=talk(max_tokens=40)))
            for death in range(1, 4):
                tasks = await streams_under_way(client, 50)
                whole = [asyncio.create_task(client.post(COMPLETIONS, json=plain(f"{n}", LONG))) for n in range(10)]
                engine_id = kill_engine(server)
                for found in await asyncio.gather(*tasks):
                    assert found.error is not None
                    assert found.error["code"] == "engine.lost"
                    assert found.error["type"] == "unavailable_error"
                    assert "SIGKILL" in found.error["message"]
                    assert [found.status, found.finish, found.is_done] == [200, None, False]
                for answer in await asyncio.gather(*whole):
                    assert answer.status_code == 503
                    assert answer.headers["retry-after"]
                    assert error_of(answer.json())["code"] in LOST
                await is_away_and_comes_back(server, client)
                assert not is_alive(engine_id)
                assert server.engine_id != engine_id
                assert server.metrics().sum("ferry_engine_restarts_total") == death
                assert text_of(await client.post(CHAT, json=talk(max_tokens=40))) == right

    asyncio.run(story())
    metrics = server.rest()
    assert metrics.sum("ferry_engine_ready") == 1
    assert server.end()[0] == 0


async def is_away_and_comes_back(server: Server, client: httpx.AsyncClient) -> None:
    """Look at a server whose engine has just died, until it answers again."""
    away = await client.get("/ready")
    assert away.status_code == 503
    assert away.headers["retry-after"]
    error = error_of(away.json())
    assert error["code"] == "engine.not-ready"
    assert "SIGKILL" in error["message"]
    assert (await client.get("/health")).status_code == 200
    refused = await client.post(COMPLETIONS, json=plain())
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert error_of(refused.json())["code"] == "engine.not-ready"
    await until(lambda: is_ready(server.url))


@pytest.mark.slow
def test_an_engine_that_hangs_is_ended_and_started_again(serve: Serve) -> None:
    server = serve().ready()

    async def story() -> None:
        async with server.client(timeout_s=120) as client:
            right = text_of(await client.post(COMPLETIONS, json=plain()))
            tasks = await streams_under_way(client, 5)
            begun_s = time.monotonic()
            engine_id = kill_engine(server, signal.SIGSTOP)
            assert (await client.get("/health")).status_code == 200
            for found in await asyncio.gather(*tasks):
                assert found.error is not None
                assert found.error["code"] == "engine.lost"
                assert "hung" in found.error["message"]
            assert time.monotonic() - begun_s < 60
            assert not is_alive(engine_id)
            await until(lambda: is_ready(server.url))
            assert text_of(await client.post(COMPLETIONS, json=plain())) == right

    asyncio.run(story())
    assert server.end()[0] == 0


@pytest.mark.slow
def test_a_server_whose_engine_hangs_can_be_stopped(serve: Serve) -> None:
    server = serve("--drain-timeout", "1").ready()

    async def story() -> None:
        async with server.client() as client:
            (task,) = await streams_under_way(client, 1)
            engine_id = kill_engine(server, signal.SIGSTOP)
            server.process.send_signal(signal.SIGTERM)
            found = await task
            assert found.error is not None
            assert found.error["code"] == "serve.stopping"
            await until(lambda: not is_alive(engine_id))

    asyncio.run(story())
    assert server.ended()[0] == 0
