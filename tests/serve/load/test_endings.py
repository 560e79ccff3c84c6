"""The end of a server: asked for, hurried, or forced. No answer is lost that had time, and no process is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from load.asking import CHAT, COMPLETIONS, Streamed, error_of, plain, stream, talk
from load.conftest import Serve
from load.serving import Server, children_of, command_of, is_alive, until, wait_until

ENDLESS = 16_000


def has_begun(task_events: asyncio.Event, server: Server, signum: int, number: int) -> None:
    """Send a signal with the third event of a stream."""
    if number == 3:
        server.process.send_signal(signum)
        task_events.set()


def test_a_stream_that_runs_when_the_server_is_stopped_is_finished(serve: Serve) -> None:
    server = serve().ready()

    async def story() -> None:
        stopped = asyncio.Event()
        async with server.client() as client:
            running = asyncio.create_task(
                stream(client, plain(max_tokens=600), on_event=lambda n: has_begun(stopped, server, signal.SIGTERM, n))
            )
            await stopped.wait()
            await asyncio.to_thread(server.errors.wait_for, "stopping: 1 request may")
            late = await client.post(COMPLETIONS, json=plain())
            assert late.status_code == 503
            assert late.headers["retry-after"]
            assert error_of(late.json())["code"] == "serve.stopping"
            found = await running
            assert [found.is_done, found.finish, found.error] == [True, "length", None]
            assert found.usage is not None
            assert found.usage["completion_tokens"] == 600

    engine_id = server.engine_id
    asyncio.run(story())
    status, screen = server.ended()
    assert status == 0
    assert "stopped   by SIGTERM" in screen
    assert not is_alive(engine_id)


@pytest.mark.slow
def test_many_streams_and_whole_answers_are_finished_within_the_time_to_drain(serve: Serve) -> None:
    server = serve("--max-num-seqs", "16").ready()

    async def story() -> tuple[list[Streamed], list[httpx.Response]]:
        stopped = asyncio.Event()
        async with server.client() as client:
            streams = [
                asyncio.create_task(stream(client, plain(f"Stream {index}", 150), on_event=lambda _: stopped.set()))
                for index in range(40)
            ]
            whole = [asyncio.create_task(client.post(CHAT, json=talk(f"{n}", 50))) for n in range(10)]
            await stopped.wait()
            # All are inside, most of them in the queue.
            await until(lambda: server.metrics().sum("ferry_requests_inside") == 50)
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*streams), await asyncio.gather(*whole)

    streams, whole = asyncio.run(story())
    assert all(found.is_done and found.finish == "length" for found in streams)
    assert [answer.status_code for answer in whole] == [200] * 10
    status, screen = server.ended()
    assert status == 0
    assert "answers   50" in screen
    assert "cut off" not in screen


@pytest.mark.slow
def test_an_answer_longer_than_the_time_to_drain_is_cut_with_an_error(serve: Serve) -> None:
    server = serve("--drain-timeout", "1").ready()

    async def story() -> tuple[Streamed, httpx.Response]:
        stopped = asyncio.Event()
        async with server.client() as client:
            whole = asyncio.create_task(client.post(COMPLETIONS, json=plain(max_tokens=ENDLESS)))
            await until(lambda: server.metrics().sum("ferry_requests_inside") == 1)
            found = await stream(
                client,
                talk(max_tokens=ENDLESS),
                CHAT,
                on_event=lambda number: has_begun(stopped, server, signal.SIGTERM, number),
            )
            return found, await whole

    found, whole = asyncio.run(story())
    assert found.error is not None
    assert [found.error["code"], found.is_done, found.finish] == ["serve.stopping", False, None]
    assert found.pieces
    assert whole.status_code == 503
    assert error_of(whole.json())["code"] == "serve.stopping"
    status, screen = server.ended(timeout_s=10)
    assert status == 0
    assert "cut off   2 requests" in screen


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once(serve: Serve) -> None:
    server = serve().ready()
    engine_id = server.engine_id

    async def story() -> None:
        stopped = asyncio.Event()
        async with server.client() as client:
            running = asyncio.create_task(
                stream(
                    client,
                    plain(max_tokens=ENDLESS),
                    on_event=lambda number: has_begun(stopped, server, signal.SIGTERM, number),
                )
            )
            await stopped.wait()
            await asyncio.to_thread(server.errors.wait_for, "stopping: 1 request may")
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                await running

    asyncio.run(story())
    assert server.ended(timeout_s=3)[0] == -signal.SIGTERM
    assert wait_until(lambda: not is_alive(engine_id)) < 3


@pytest.mark.slow
def test_a_signal_while_the_model_is_loaded_ends_the_server(serve: Serve) -> None:
    server = serve().listening()
    wait_until(lambda: server.engine_id != 0)
    engine_id = server.engine_id
    status, screen = server.end(timeout_s=10)
    assert status == 0
    assert "answers   0" in screen
    assert not is_alive(engine_id)


@pytest.mark.slow
def test_a_killed_front_end_takes_its_engine_with_it(serve: Serve) -> None:
    server = serve().ready()
    engine_id = server.engine_id

    async def story() -> None:
        stopped = asyncio.Event()
        async with server.client() as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await stream(
                    client,
                    plain(max_tokens=ENDLESS),
                    on_event=lambda number: has_begun(stopped, server, signal.SIGKILL, number),
                )

    asyncio.run(story())
    assert wait_until(lambda: not is_alive(engine_id)) < 5


PARENT = """
import subprocess, sys
with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
    for line in server.stderr:
        sys.stdout.write(line)
        sys.stdout.flush()
"""


@pytest.mark.slow
def test_a_server_whose_parent_was_killed_goes_on_and_ends_well(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ferry", "serve", str(small), "--port", "0", "--threads", "1", "--log-requests"]
    home = {**os.environ, "FERRY_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *command], stdout=subprocess.PIPE, text=True, env=home
    ) as parent:
        assert parent.stdout is not None
        url = ""
        for line in parent.stdout:
            url = line.split("listening on ")[1].split(";")[0] if "listening on" in line else url
            if "ready after" in line:
                break
        (server_id,) = [one for one in children_of(parent.pid) if "serve" in command_of(one)]
        (engine_id,) = [one for one in children_of(server_id) if "native.child" in command_of(one)]
        parent.kill()
    try:
        # Nobody reads what the server writes any more, and it has something to write of each request.
        for _ in range(3):
            assert httpx.post(f"{url}{COMPLETIONS}", json=plain(), timeout=30).status_code == 200
        begun_s = time.monotonic()
        os.kill(server_id, signal.SIGTERM)
        wait_until(lambda: not is_alive(server_id) and not is_alive(engine_id))
        assert time.monotonic() - begun_s < 10
    finally:
        for process_id in (server_id, engine_id):
            if is_alive(process_id):
                os.kill(process_id, signal.SIGKILL)
