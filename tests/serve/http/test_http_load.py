"""Many clients at once, of which some go away, send nonsense or ask for the impossible: nothing lost, nothing hung."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from house import served_by_command

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "kind": {"const": number},
            "list": {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 3},
        },
        "required": ["kind", "list"],
        "additionalProperties": False,
    }
    for number in range(24)
]
SECONDS = 60


async def ask(client: httpx.AsyncClient, chance: random.Random) -> str:
    """Do one of many things, and return what came of it."""
    kind = chance.choice(["text", "stream", "gone", "gone stream", "guided", "guided", "nonsense", "long", "chat"])
    body: dict[str, Any] = {"prompt": "x" * chance.randint(1, 200), "max_tokens": chance.randint(1, 40)}
    if kind == "nonsense":
        content = chance.choice([b"{", b'{"prompt": 1}', b"\xff", b'{"prompt": "x", "guided_jsn": {}}'])
        answer = await client.post("/v1/completions", content=content)
        assert answer.status_code == 400, answer.text
    elif kind == "guided":
        schema = chance.choice(SCHEMAS)
        answer = await client.post("/v1/completions", json={**body, "max_tokens": 60, "guided_json": schema})
        if answer.status_code == 429:
            return "429"
        choice = answer.json()["choices"][0]
        assert choice["guided"]["valid"], choice
        jsonschema.validate(json.loads(choice["text"]), schema)
    elif kind.startswith("gone"):
        asking = asyncio.create_task(
            client.post("/v1/completions", json={**body, "max_tokens": 500, "stream": "s" in kind})
        )
        await asyncio.wait([asking], timeout=chance.random())
        asking.cancel()
        await asyncio.wait([asking])
    elif kind == "stream":
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            raw = (await answer.aread()).decode()
        if answer.status_code == 429:
            return "429"
        assert raw.endswith("data: [DONE]\n\n"), raw[-300:]
        assert json.loads(raw.split("\n\n")[-3][6:])["usage"]["completion_tokens"] <= body["max_tokens"]
    else:
        path = "/v1/completions"
        if kind == "chat":
            path, body = (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "n": 2},
            )
        if kind == "long":
            body["prompt"] = "y" * 1900
        answer = await client.post(path, json=body)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            return "429"
        assert answer.status_code == 200, answer.text
        assert all(choice["finish_reason"] for choice in answer.json()["choices"])
    return kind


async def crowd(url: str, num_clients: int, seconds: float) -> Counter[str]:
    until = time.monotonic() + seconds
    found: Counter[str] = Counter()
    no_limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=no_limits, verify=False) as shared:

        async def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until:
                found[await ask(shared, chance)] += 1

        await asyncio.gather(*map(client, range(num_clients)))
    return found


def resident_bytes(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_256_clients_lose_nothing_and_memory_stays(small_model: Path, tmp_path: Path) -> None:
    with served_by_command(small_model, tmp_path, "--max-queue", "200", "--max-num-seqs", "16") as (process, url):
        asyncio.run(crowd(url, 256, SECONDS / 4))
        before = resident_bytes(process.pid)
        found = asyncio.run(crowd(url, 256, SECONDS))
        assert sum(found.values()) > 256
        assert {"text", "stream", "guided", "nonsense", "long", "chat"} <= set(found)
        assert resident_bytes(process.pid) - before < 20_000_000
        client = httpx.Client(base_url=url, timeout=60)
        page = client.get("/metrics").text
        for line in ("ferry_requests_inside 0", "ferry_engine_running 0", "ferry_engine_waiting 0"):
            assert line in page
        assert 'verdict="broken"' not in page
        assert 'status="500"' not in page
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
