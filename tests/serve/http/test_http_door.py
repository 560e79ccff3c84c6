"""The border of the server: keys, request ids, probes, metrics, the page, and the end on a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from house import NAME, Door, House
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families


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


class Output(threading.Thread):
    """The lines that a process writes, and waiting for one of them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._stream = process.stderr
        self.lines: list[str] = []
        self._more = threading.Condition()
        self.start()

    def run(self) -> None:
        assert self._stream is not None
        for line in self._stream:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()

    def wait_for(self, word: str) -> str:
        with self._more:
            assert self._more.wait_for(lambda: any(word in line for line in self.lines), 60), self.lines
            return next(line for line in self.lines if word in line)


def test_a_signal_lets_running_answers_end(small_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ferry", "serve", str(small_model), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--kv-cache-memory", "64MB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FERRY_HOME": str(tmp_path)},
    )
    said = Output(process)
    try:
        url = said.wait_for("listening on").split("listening on ")[1].split(";")[0]
        client = httpx.Client(base_url=url, timeout=60)
        assert client.get("/health").status_code == 200
        early = client.get("/ready")
        assert early.status_code == 503
        assert early.headers["retry-after"]
        assert early.json()["error"]["code"] == "engine.not-ready"
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        said.wait_for("ready after")
        body = {"prompt": "hi", "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            seen = [next(lines)]
            process.send_signal(signal.SIGTERM)
            said.wait_for("stopping: 1 requests")
            late = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert [late.status_code, late.json()["error"]["code"]] == [503, "serve.stopping"]
            seen += list(lines)
        assert seen[-2] == "data: [DONE]"
        assert json.loads(seen[-4][6:])["usage"]["completion_tokens"] == 1500
        screen, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "stopped   by SIGTERM" in screen
        assert "answers   1" in screen
    finally:
        process.kill()
        process.wait()
