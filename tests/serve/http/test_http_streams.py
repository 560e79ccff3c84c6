"""Streams as bytes on the wire, and what happens when the client, the queue or the engine ends one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from house import NAME, Door, House
from openai import OpenAI

LONG = {"prompt": "hi", "max_tokens": 1900, "temperature": 0, "ignore_eos": True}
Eventually = Callable[[Callable[[], bool]], None]


def running(house: House) -> int:
    """Return how many answers the engine works at."""
    stats = house.do(house.engine.stats())
    return stats.num_running + stats.num_waiting


def test_a_stream_is_server_sent_events(door: Door) -> None:
    body = {"prompt": "hi", "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": True, "foo": 1}
    with door.client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "mine"}) as answer:
        raw = answer.read().decode()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-request-id"] == "mine"
    assert "content-length" not in answer.headers
    events = raw.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert chunks[-1]["warnings"] == ["'foo' is not a field of this server and was ignored"]
    assert not any("warnings" in chunk for chunk in chunks[:-1])


def test_letters_of_several_tokens_are_never_torn(door: Door, house: House) -> None:
    text = "日本 \U0001f469\u200d\U0001f467 ä\u2028\x85."  # the last two are ends of lines for some clients
    body = {"prompt": "hi", "max_tokens": 60, "guided_choice": [text], "stream": True}
    with door.client.stream("POST", "/v1/completions", json=body) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == text
    assert not any("\ufffd" in piece for piece in texts)
    assert chunks[-1]["usage"]["completion_tokens"] >= len(house.model.encode(text))


def test_streams_of_several_prompts_are_those_without_streaming(door: Door) -> None:
    body = {
        "prompt": ["one", "two"],
        "max_tokens": 12,
        "temperature": 1,
        "seed": 3,
        "n": 2,
        "echo": True,
        "logprobs": 1,
    }
    whole = door.post("/v1/completions", body).json()
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    with door.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                texts[choice["index"]] += choice["text"]
                tokens[choice["index"]] += choice["logprobs"]["tokens"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert tokens == [choice["logprobs"]["tokens"] for choice in whole["choices"]]


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_hangs_up_frees_the_engine(
    door: Door, house: House, eventually: Eventually, is_stream: bool
) -> None:
    async def ask_and_go() -> None:
        async with httpx.AsyncClient(base_url=door.url, timeout=60) as client:
            body = {**LONG, "stream": is_stream, "prompt": ["a", "b"]}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            while (
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(house.engine.stats(), house._loop)) is None
            ):
                await asyncio.sleep(0)
            while not door.served.gate.num_inside or door.served.gate.num_waiting:
                await asyncio.sleep(0.005)
            asking.cancel()

    generated = house.do(house.engine.stats()).num_generated_tokens
    asyncio.run(ask_and_go())
    eventually(lambda: door.served.gate.num_inside == 0)
    eventually(lambda: running(house) == 0)
    assert house.do(house.engine.stats()).num_generated_tokens - generated < 2 * 1900


def test_a_full_queue_tells_clients_when_to_come_back(house: House, eventually: Eventually) -> None:
    narrow = house.open(max_num_seqs=1, spare_places=0, max_queue=1)
    with narrow.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        waiting = threading.Thread(target=narrow.post, args=("/v1/completions", {"prompt": "x", "max_tokens": 1}))
        waiting.start()
        eventually(lambda: narrow.served.gate.num_waiting == 1)
        refused = narrow.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        client = OpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=NAME, prompt="x")
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    page = narrow.client.get("/metrics").text
    assert 'ferry_rejections_total{reason="rate_limit_exceeded"} 2' in page


def test_a_client_that_reads_nothing_gives_its_place_back(house: House, eventually: Eventually) -> None:
    patient = house.open(unread_s=0.5, send_bytes=4096)
    content = json.dumps({**LONG, "logprobs": 20, "stream": True}).encode()
    host, port = patient.url.removeprefix("http://").split(":")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode())
        deaf.sendall(content)
        eventually(lambda: patient.served.measures.cut.total == 1)
        assert patient.served.gate.num_inside == 0
        assert 'ferry_answers_cut_total{reason="client"} 1' in patient.client.get("/metrics").text


def test_a_request_that_takes_too_long_is_ended(house: House, eventually: Eventually) -> None:
    hasty = house.open(request_timeout_s=0.1)
    answer = hasty.post("/v1/completions", LONG)
    assert [answer.status_code, answer.json()["error"]["code"]] == [503, "serve.timeout"]
    with hasty.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        raw = answer.read().decode()
    assert json.loads(raw.split("event: error\ndata: ")[1])["error"]["code"] == "serve.timeout"
    eventually(lambda: running(house) == 0)


def test_an_engine_that_dies_ends_its_streams_with_an_error_and_comes_back(
    house: House, door: Door, eventually: Eventually
) -> None:
    raw = ""
    with door.client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
        for number, line in enumerate(answer.iter_lines()):
            raw += line + "\n"
            if number == 4:
                os.kill(house.engine.process_id, signal.SIGKILL)  # type: ignore[attr-defined]
    assert answer.status_code == 200
    assert "event: error\n" in raw
    assert "[DONE]" not in raw
    error = json.loads(raw.split("event: error\ndata: ")[1])["error"]
    assert error["code"] == "engine.lost"
    assert error["type"] == "unavailable_error"
    away = door.post("/v1/completions", {"prompt": "x"})
    assert away.status_code == 503
    assert away.headers["retry-after"]
    assert door.client.get("/health").status_code == 200
    assert door.client.get("/ready").status_code == 503
    house.do(ready(house))
    assert door.post("/v1/completions", {"prompt": "x"}).status_code == 200
    assert "ferry_engine_restarts_total 1" in door.client.get("/metrics").text


async def ready(house: House) -> None:
    while house.engine.condition.state != "ready":
        await asyncio.sleep(0.01)


def chat_body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"messages": messages, "max_tokens": 1900, "ignore_eos": True, "temperature": 0, **fields}
