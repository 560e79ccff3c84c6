"""What clients ask under load, and what they make of an answer: a stream put together, an error in its one shape."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JsonObject = dict[str, Any]


@dataclass
class Streamed:
    """What a stream brought."""

    status: int = 0
    pieces: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """When each event came."""
    finish: str | None = None
    guided: JsonObject | None = None
    usage: JsonObject | None = None
    error: JsonObject | None = None
    is_done: bool = False
    """Whether `[DONE]` came."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    @property
    def longest_pause_s(self) -> float:
        """The longest time between two events."""
        return max((after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)


def plain(prompt: str = "Once upon a time", max_tokens: int = 16, **fields: Any) -> JsonObject:
    """Return a request whose answer is always the same and as long as is said."""
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


def talk(words: str = "Hello", max_tokens: int = 16, **fields: Any) -> JsonObject:
    """Return the same as a conversation."""
    message = {"role": "user", "content": words}
    return {"messages": [message], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


async def stream(
    client: httpx.AsyncClient,
    body: JsonObject,
    path: str = COMPLETIONS,
    on_event: Callable[[int], object] = lambda number: None,
) -> Streamed:
    """Ask for a stream and return all of it; `on_event` is told the number of each event."""
    found = Streamed()
    async with client.stream("POST", path, json={**body, "stream": True}) as answer:
        found.status = answer.status_code
        if answer.status_code != 200:
            found.error = error_of(json.loads(await answer.aread()))
            return found
        async for name, data in events(answer):
            found.times_s.append(time.monotonic())
            if name == "error":
                found.error = error_of(json.loads(data))
            elif data == "[DONE]":
                found.is_done = True
            else:
                _add(found, json.loads(data))
            on_event(len(found.times_s))
    return found


async def events(answer: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """Return the name and data of each event."""
    name = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, line.removeprefix("data: ")
            name = ""
        else:
            assert line == ""


def _add(found: Streamed, chunk: JsonObject) -> None:
    for choice in chunk["choices"]:
        found.pieces.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
        found.finish = choice["finish_reason"] or found.finish
        found.guided = choice.get("guided", found.guided)
    found.usage = chunk.get("usage") or found.usage


def error_of(body: JsonObject) -> JsonObject:
    """Return the error in a body, which has the one shape and nothing beside it."""
    assert list(body) == ["error"]
    error: JsonObject = body["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["message"]
    assert error["type"]
    assert error["code"]
    assert error["request_id"]
    return error


def text_of(answer: httpx.Response) -> str:
    """Return the text of a whole answer."""
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])
