"""The border of the server: keys, request ids, probes, metrics, the page, and the end on a signal."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from house import NAME, Door, House, served_by_command
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from ferry.engines.engine import EngineSettings, find


def test_a_key_is_needed_where_keys_are_set(house: House) -> None:
    guarded = house.open(api_keys=("alpha", "beta"))
    for path in ("/v1/models", "/v1/nothing", "/tokenize"):
        answer = guarded.client.get(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/metrics", "/version", "/"):
        assert guarded.client.get(path).status_code == 200
    for key in ("alpha", "beta"):
        assert OpenAI(base_url=f"{guarded.url}/v1", api_key=key).models.list().data[0].id == NAME
    with pytest.raises(openai.AuthenticationError) as wrong:
        OpenAI(base_url=f"{guarded.url}/v1", api_key="alph", max_retries=0).models.list()
    assert wrong.value.code == "invalid_api_key"


@pytest.mark.parametrize(("given", "is_kept"), [("abc-1", True), ("a b", False), ("x" * 200, False), ("", False)])
def test_a_request_has_an_id(door: Door, given: str, is_kept: bool) -> None:
    answer = door.client.get("/v1/models", headers={"x-request-id": given} if given else {})
    assert (answer.headers["x-request-id"] == given) is is_kept
    assert answer.headers["x-request-id"]


def test_probes_answer(door: Door) -> None:
    assert door.client.get("/health").json() == {"status": "alive"}
    assert door.client.get("/ready").json() == {"status": "ready", "model": NAME, "engine": "native"}
    assert door.client.get("/version").json()["version"]


def test_probes_answer_those_who_want_no_body(door: Door) -> None:
    for path in ("/health", "/ready", "/v1/models", "/"):
        answer = door.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_pages_from_elsewhere_cannot_ask_a_server_of_this_machine(house: House) -> None:
    local = house.open(trusted_hosts=("localhost", "127.0.0.1", "::1"))
    for headers in ({"host": "localhost:1"}, {"origin": local.url}, {"host": "[::1]:80"}, {}):
        assert local.client.get("/v1/models", headers=headers).status_code == 200
    for headers, code in (
        ({"host": "rebound.example:8080"}, "request.host"),
        ({"host": "localhost.example"}, "request.host"),
        ({"origin": "https://page.example"}, "request.origin"),
        ({"origin": "null"}, "request.origin"),
    ):
        body = b'{"prompt": "x"}'
        answer = local.client.post("/v1/completions", content=body, headers={"content-type": "text/plain", **headers})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, code)
        assert "--api-key-file" in answer.json()["error"]["message"]
        assert local.client.get("/health", headers=headers).status_code == 200


def test_a_server_answers_before_its_engine_does(house: House) -> None:
    early = house.open(engine=find("native").make(EngineSettings(house.path)))
    assert early.client.get("/health").status_code == 200
    assert early.client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert "ferry_engine_ready 0" in early.client.get("/metrics").text
    for answer in (early.client.get("/ready"), early.post("/v1/completions", {"prompt": "x"})):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "engine.not-ready"
    # What is wrong in any case is said at once.
    assert early.post("/v1/completions", {"prompt": 7}).status_code == 400


def test_metrics_are_read_by_prometheus(house: House) -> None:
    door = house.open()
    door.post("/v1/completions", {"prompt": "hello", "max_tokens": 7, "ignore_eos": True})
    door.post("/v1/completions", {"prompt": "hello", "max_tokens": -7})
    door.post("/v1/completions", {"prompt": "hello", "guided_choice": ["a"]})
    door.client.get("/nothing/at/all")
    answer = door.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            found[sample.name + "".join(f",{value}" for value in sample.labels.values())] = sample.value
    assert found["ferry_requests_total,/v1/completions,200"] == 2
    assert found["ferry_requests_total,/v1/completions,400"] == 1
    assert found["ferry_requests_total,unknown,404"] == 1
    assert found["ferry_answers_total,length"] == 1
    assert found["ferry_answers_total,stop"] == 1
    assert found["ferry_guided_answers_total,valid"] == 1
    assert found["ferry_prompt_tokens_total"] == 10
    assert found["ferry_time_to_first_token_seconds_count"] == 2
    assert found["ferry_time_to_first_token_seconds_bucket,+Inf"] == 2
    assert found["ferry_inter_token_seconds_count"] >= 6
    assert found["ferry_request_seconds_count"] == found["ferry_queue_seconds_count"] == 2
    assert found["ferry_engine_ready"] == 1
    assert found["ferry_requests_inside"] == found["ferry_requests_waiting"] == 0
    assert 0 <= found["ferry_kv_cache_used_ratio"] <= 1


def test_the_page_is_served(door: Door) -> None:
    page = door.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "content-security-policy" in page.headers


def test_a_death_of_the_engine_and_its_return_are_said_and_recorded(small_model: Path, tmp_path: Path) -> None:
    with served_by_command(small_model, tmp_path) as (process, _):
        (engine_id,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(engine_id), signal.SIGKILL)
        assert "(signal SIGKILL); restart 1 begins" in process.said.wait_for("the engine died")
        assert "(restart 1)" in process.said.wait_for("the engine is ready again after")
        process.send_signal(signal.SIGTERM)
        process.end()
    (record,) = tmp_path.glob("**/events.jsonl")
    events = [json.loads(line) for line in record.read_text().splitlines()]
    died, back = ([event for event in events if event["event"] == f"engine {what}"] for what in ("died", "ready again"))
    assert [event["restart"] for event in (*died, *back)] == [1, 1]
    assert died[0]["reason"] == "the engine's process ended (signal SIGKILL)"


def test_the_same_requests_after_a_restart_get_the_same_answers(house: House) -> None:
    def texts(door: Door) -> list[str]:
        body = {"prompt": "hello", "max_tokens": 12, "ignore_eos": True, "temperature": 1.5}
        return [door.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(2)]

    first = texts(house.open(num_asked=10**9))
    assert texts(house.open(num_asked=10**9)) == first
    assert first[0] != first[1]


def test_a_signal_lets_running_answers_end(small_model: Path, tmp_path: Path) -> None:
    with served_by_command(small_model, tmp_path, "--log-requests") as (process, url):
        client = httpx.Client(base_url=url, timeout=60)
        client.get("/x%0Aready%1b[31m")
        # What a client sent can neither begin a line nor colour it.
        assert "path=/x\\nready\\x1b[31m status=404" in process.said.wait_for("GET")
        assert client.get("/v1/models", headers={"host": "rebound.example"}).status_code == 403
        body = {"prompt": "hi", "max_tokens": 800, "ignore_eos": True, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            seen = [next(lines)]
            process.send_signal(signal.SIGTERM)
            process.said.wait_for("stopping: 1 request may")
            late = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert [late.status_code, late.json()["error"]["code"]] == [503, "serve.stopping"]
            seen += list(lines)
        assert seen[-2] == "data: [DONE]"
        assert json.loads(seen[-4][6:])["usage"]["completion_tokens"] == 800
        screen = process.end()
        assert process.returncode == 0
        assert "stopped   by SIGTERM" in screen
        assert "answers   1" in screen
