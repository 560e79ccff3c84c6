"""A crowd of clients that ask for everything at once: whole, streamed and guided answers, some nonsense, some hang up.

What each of them gets is checked on the spot. What they got is counted, to be compared with what the server counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import jsonschema

from load.asking import CHAT, COMPLETIONS, JsonObject, error_of, plain, stream, talk, text_of

SCHEMAS: tuple[JsonObject, ...] = (
    {"enum": ["red", "green", "blue"]},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 4},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"is": {"type": "boolean"}}, "required": ["is"], "additionalProperties": False},
)
NONSENSE: tuple[tuple[int, bytes], ...] = (
    (400, b'{"prompt": "x", '),
    (400, b"\xff\xfe\x00"),
    (400, b'["no", "object"]'),
    (400, json.dumps(plain(max_tokens=-1)).encode()),
    (400, json.dumps({"prompt": "x", "temperature": "hot"}).encode()),
    (400, json.dumps({"prompt": "x", "guided_jsn": {}}).encode()),
    (400, json.dumps({"prompt": "x", "guided_regex": "("}).encode()),
    (400, json.dumps({"prompt": [10**9]}).encode()),
    (404, json.dumps({"prompt": "x", "model": "another"}).encode()),
)
PROMPTS = tuple(f"{word} " * length for word, length in (("One", 3), ("Two", 30), ("Three", 120), ("Four", 400)))
LENGTHS = (1, 8, 24, 48)


@dataclass
class Tally:
    """What the crowd got."""

    got: Counter[str] = field(default_factory=Counter)
    """`whole 200`, `stream 429` and so on; `cut` of those that hung up."""
    texts: dict[str, str] = field(default_factory=dict)
    """The answer to each question that was asked before. It is always the same."""
    longest_s: float = 0.0

    def is_same(self, question: str, text: str) -> bool:
        """Return whether a question got the answer that it got before, if it was asked before."""
        return self.texts.setdefault(question, text) == text

    def sum(self, word: str) -> int:
        """Return how often something with a word in it came."""
        return sum(count for name, count in self.got.items() if word in name)


@dataclass
class Client:
    """One of the crowd. Its choices follow from its number."""

    http: httpx.AsyncClient
    tally: Tally
    number: int

    async def ask_until(self, end_s: float) -> None:
        """Ask one thing after the other, until it is time to go."""
        chance = random.Random(self.number)
        ways: tuple[tuple[Callable[[random.Random], Awaitable[str]], int], ...] = (
            (self._whole, 4),
            (self._streamed, 4),
            (self._guided, 3),
            (self._nonsense, 1),
            (self._cut, 2),
        )
        while time.monotonic() < end_s:
            (way,) = chance.choices([way for way, _ in ways], [weight for _, weight in ways])
            begun_s = time.monotonic()
            got = await way(chance)
            self.tally.longest_s = max(self.tally.longest_s, time.monotonic() - begun_s)
            self.tally.got[got] += 1
            if "429" in got:
                await asyncio.sleep(1)  # as the server asks for at least

    async def _whole(self, chance: random.Random) -> str:
        prompt, length = chance.choice(PROMPTS), chance.choice(LENGTHS)
        path, body = (COMPLETIONS, plain(prompt, length)) if chance.random() < 0.5 else (CHAT, talk(prompt, length))
        answer = await self.http.post(path, json=body)
        if answer.status_code != 200:
            return f"whole {refused(answer)}"
        assert answer.json()["usage"]["completion_tokens"] == length
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert self.tally.is_same(f"{path} {prompt} {length}", text_of(answer))
        return "whole 200"

    async def _streamed(self, chance: random.Random) -> str:
        prompt, length = chance.choice(PROMPTS), chance.choice(LENGTHS)
        path, body = (COMPLETIONS, plain(prompt, length)) if chance.random() < 0.5 else (CHAT, talk(prompt, length))
        found = await stream(self.http, body, path)
        if found.status != 200:
            assert found.error is not None
            assert [found.status, found.error["code"]] == [429, "rate_limit_exceeded"]
            return "stream 429"
        assert [found.is_done, found.finish, found.error] == [True, "length", None]
        assert found.usage is not None
        assert found.usage["completion_tokens"] == length
        assert self.tally.is_same(f"{path} {prompt} {length}", found.text)
        return "stream 200"

    async def _guided(self, chance: random.Random) -> str:
        schema, is_stream = chance.choice(SCHEMAS), chance.random() < 0.5
        body = {"prompt": "Say", "max_tokens": 64, "temperature": 1, "guided_json": schema}
        if is_stream:
            found = await stream(self.http, body)
            if found.status != 200:
                return f"guided {found.status}"
            assert found.is_done
            text, finish, guided = found.text, found.finish, found.guided
        else:
            answer = await self.http.post(COMPLETIONS, json=body)
            if answer.status_code != 200:
                return f"guided {refused(answer)}"
            choice = answer.json()["choices"][0]
            text, finish, guided = choice["text"], choice["finish_reason"], choice["guided"]
        assert guided is not None
        assert guided["valid"] is (finish == "stop")
        if finish == "stop":
            jsonschema.validate(json.loads(text), schema)
        return "guided 200"

    async def _nonsense(self, chance: random.Random) -> str:
        status, content = chance.choice(NONSENSE)
        answer = await self.http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        if answer.status_code == 429:
            return f"nonsense {refused(answer)}"
        assert answer.status_code == status, answer.text
        error_of(answer.json())
        return f"nonsense {status}"

    async def _cut(self, chance: random.Random) -> str:
        """Hang up in the middle: of a stream after some events, of anything after some time."""
        body, enough = plain(chance.choice(PROMPTS), 2000), chance.randrange(1, 30)
        if chance.random() < 0.5:
            patience_s = chance.uniform(0.001, 0.5)
            try:
                answer = await asyncio.wait_for(self.http.post(COMPLETIONS, json=body), patience_s)
            except asyncio.TimeoutError:
                return "cut"
            return f"whole {refused(answer)}" if answer.status_code != 200 else "whole 200"
        async with self.http.stream("POST", COMPLETIONS, json={**body, "stream": True}) as opened:
            if opened.status_code != 200:
                await opened.aread()
                return f"stream {refused(opened)}"
            async for _ in opened.aiter_lines():
                enough -= 1
                if enough == 0:
                    return "cut"
        return "stream 200"


def refused(answer: httpx.Response) -> int:
    """Return the status of an answer that tells a client to come back; any other is a fault."""
    assert answer.status_code == 429, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert error_of(answer.json())["code"] == "rate_limit_exceeded"
    return 429


async def gather(http: httpx.AsyncClient, tally: Tally, number: int, seconds: float) -> None:
    """Let so many clients ask for so long; raise what any of them found wrong."""
    end_s = time.monotonic() + seconds
    await asyncio.gather(*(Client(http, tally, index).ask_until(end_s) for index in range(number)))
