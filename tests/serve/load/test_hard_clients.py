"""Clients that do not behave: they do not read, write a byte at a time, or come when the house is full."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from load.asking import COMPLETIONS, error_of, plain, stream, text_of
from load.conftest import Serve
from load.serving import Server, memory_of, until

WORDY = {**plain(max_tokens=2400, logprobs=20, n=2, stream=True), "temperature": 1}
"""Asks for some 6 MB, which is more than the system's buffers of a connection hold."""
NUM_HALF_OPEN = 300


def opened(server: Server, *, receive_bytes: int | None = None) -> socket.socket:
    """Return a bare connection to a server."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, int(port)))
    return connection


def request_bytes(body: object) -> bytes:
    """Return a request as it is on the wire."""
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


async def running(server: Server, number: int) -> None:
    """Return when so many requests are inside."""
    await until(lambda: server.metrics().sum("ferry_requests_inside") == number)


@pytest.mark.slow
def test_clients_that_do_not_read_cost_neither_memory_nor_others_time(serve: Serve) -> None:
    server = serve(cache="64MB").ready()

    async def story() -> None:
        async with server.client() as client:
            right = text_of(await client.post(COMPLETIONS, json=plain(max_tokens=200)))
            alone = await stream(client, plain("Warm", 200))
            before = memory_of(server.process.pid)
            deaf = [opened(server, receive_bytes=4096) for _ in range(2)]
            for number, connection in enumerate(deaf):
                connection.sendall(request_bytes({**WORDY, "prompt": f"Deaf {number}"}))
            await running(server, len(deaf))
            for _ in range(5):
                assert text_of(await client.post(COMPLETIONS, json=plain(max_tokens=200))) == right
            # The engine is done with all of them, and they have read nothing.
            await until(lambda: server.metrics().sum("ferry_engine_running") == 0)
            await running(server, len(deaf))
            assert memory_of(server.process.pid) < before + 40_000_000
            found = await stream(client, plain("Warm", 200))
            assert [found.text, found.is_done] == [alone.text, True]
            for connection in deaf:
                connection.close()
            await running(server, 0)

    asyncio.run(story())
    server.rest()
    assert server.end()[0] == 0


@pytest.mark.slow
def test_clients_that_do_not_read_do_not_keep_a_server_from_ending(serve: Serve) -> None:
    server = serve("--drain-timeout", "2").ready()
    connection = opened(server, receive_bytes=4096)
    connection.sendall(request_bytes(WORDY))
    asyncio.run(running(server, 1))
    status, screen = server.end(timeout_s=20)
    assert status == 0
    assert "cut off   1 request not done" in screen
    connection.close()


@pytest.mark.slow
def test_connections_that_never_say_what_they_want_hold_up_no_one(serve: Serve) -> None:
    server = serve("--drain-timeout", "2").ready()
    whole = request_bytes(plain(max_tokens=5))

    async def story() -> None:
        async with server.client() as client:
            right = text_of(await client.post(COMPLETIONS, json=plain()))
            silent = [opened(server) for _ in range(NUM_HALF_OPEN)]
            slow = [opened(server) for _ in range(20)]
            for position in range(len(whole) - 1):
                for connection in slow:
                    connection.sendall(whole[position : position + 1])
                if position % 20 == 0:
                    assert text_of(await client.post(COMPLETIONS, json=plain())) == right
            # They hold no place: none of them has asked for anything yet.
            assert server.metrics().sum("ferry_requests_inside") == 0
            for connection in slow:
                connection.sendall(whole[-1:])
            for connection in slow:
                assert (await asyncio.to_thread(connection.recv, 20)).startswith(b"HTTP/1.1 200")
            for connection in silent[: NUM_HALF_OPEN // 2]:
                connection.close()

    asyncio.run(story())
    server.rest()
    # Neither those that are still open keep it from ending.
    assert server.end(timeout_s=20)[0] == 0


@pytest.mark.slow
def test_a_full_house_tells_clients_to_come_back_and_those_who_wait_are_answered(serve: Serve) -> None:
    server = serve("--max-num-seqs", "2", "--max-queue", "5").ready()

    async def story() -> None:
        async with server.client() as client:
            long = [asyncio.create_task(stream(client, plain(f"Long {n}", 800))) for n in range(15)]
            await running(server, 15)
            refused = await asyncio.gather(*(client.post(COMPLETIONS, json=plain(f"Late {n}")) for n in range(30)))
            for answer in refused:
                assert answer.status_code == 429
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                error = error_of(answer.json())
                assert [error["type"], error["code"]] == ["rate_limit_error", "rate_limit_exceeded"]
            assert (await client.get("/ready")).status_code == 200
            assert all(found.is_done for found in await asyncio.gather(*long))
            assert (await client.post(COMPLETIONS, json=plain())).status_code == 200

    asyncio.run(story())
    metrics = server.rest()
    assert metrics.sum("ferry_rejections_total", 'reason="rate_limit_exceeded"') == 30
    assert metrics.sum("ferry_answers_total") == 16
    assert server.end()[0] == 0
