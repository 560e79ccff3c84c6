"""Many constraints at once, one many times, one that is dear; and text that tokens tear apart."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from load.asking import CHAT, COMPLETIONS, JsonObject, error_of, plain, stream, talk
from load.conftest import Serve

NUM_SCHEMAS = 24
TEXTS = (
    "😀 👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 👍🏽",
    "你好，世界。漢字仮名交じり文",
    "é ñ ü ǖ ꙮ — Z̷a̷l̷g̷o̷",
    "नमस्ते العربية עברית ไทย 한국어",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀 🜁 \u200b\u2028",
)


def schema_of(number: int) -> JsonObject:
    """Return a schema that no other number has."""
    properties: JsonObject = {
        "kind": {"const": f"kind {number}"},
        "count": {"type": "integer", "minimum": number, "maximum": number + 9},
        "tags": {"type": "array", "items": {"enum": [f"a{number}", "b"]}, "minItems": 1, "maxItems": 3},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def asked_for(schema: JsonObject) -> JsonObject:
    """Return a request for an instance."""
    return {**talk("Say it.", 200), "temperature": 1, "guided_json": schema, "ignore_eos": False}


@pytest.mark.slow
def test_two_dozen_schemas_at_once_are_all_kept_and_so_is_one_two_dozen_times(serve: Serve) -> None:
    server = serve().ready()
    schemas = [schema_of(number) for number in range(NUM_SCHEMAS)]

    async def story() -> None:
        async with server.client() as client:
            for wanted in (schemas, [schemas[3]] * NUM_SCHEMAS, schemas):
                whole = [client.post(CHAT, json=asked_for(schema)) for schema in wanted]
                streams = [stream(client, asked_for(schema), CHAT) for schema in wanted]
                answers, streamed = await asyncio.gather(asyncio.gather(*whole), asyncio.gather(*streams))
                for schema, answer, found in zip(wanted, answers, streamed, strict=True):
                    (choice,) = answer.json()["choices"]
                    assert [choice["finish_reason"], choice["guided"]] == ["stop", {"valid": True}]
                    jsonschema.validate(json.loads(choice["message"]["content"]), schema)
                    assert [found.finish, found.guided, found.is_done] == ["stop", {"valid": True}, True]
                    jsonschema.validate(json.loads(found.text), schema)

    asyncio.run(story())
    metrics = server.rest()
    num_answers = 3 * 2 * NUM_SCHEMAS
    assert metrics.sum("ferry_guided_answers_total", 'verdict="valid"') == num_answers
    assert metrics.sum("ferry_guided_answers_total") == num_answers
    assert server.end()[0] == 0


def dear_schema(number: int) -> JsonObject:
    """Return a schema whose alternatives must be kept apart, pair by pair."""
    parts: list[Any] = [
        {
            "properties": {f"p{index}": {"type": "string", "pattern": f"^[a-z]*{index}x{number}[a-z]*$"}},
            "required": [f"p{index}"],
        }
        for index in range(14)
    ]
    return {"oneOf": parts, "not": {"anyOf": [{"required": [f"p{index}", f"p{index + 1}"]} for index in range(12)]}}


@pytest.mark.slow
def test_schemas_that_are_dear_to_compile_hold_up_no_one(serve: Serve) -> None:
    server = serve("--set", "limits.guided_time_limit=3").ready()

    async def story() -> None:
        async with server.client() as client:
            right = await stream(client, plain("Beside", 400))
            dear = [
                asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "x", "guided_json": dear_schema(number)}))
                for number in range(6)
            ]
            found = await stream(client, plain("Beside", 400))
            assert not dear[-1].done()
            answers = await asyncio.gather(*dear)
            assert [found.text, found.is_done] == [right.text, True]
            # Compiling takes cores, but never the event loop for itself.
            assert found.longest_pause_s < 2
            for answer in answers:
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["guided"]
                else:
                    assert answer.status_code == 400
                    assert error_of(answer.json())["code"].startswith("guided.")
            # What took too long takes no time from the next.
            quick = await client.post(CHAT, json=asked_for(schema_of(1)))
            assert quick.json()["choices"][0]["guided"] == {"valid": True}

    asyncio.run(story())
    server.rest()
    assert server.end()[0] == 0


@pytest.mark.slow
def test_letters_that_tokens_tear_apart_come_whole_from_many_streams_at_once(serve: Serve) -> None:
    server = serve().ready()

    async def story() -> None:
        async with server.client() as client:
            for path, body in ((COMPLETIONS, plain(max_tokens=200)), (CHAT, talk(max_tokens=200))):
                wanted = [{**body, "ignore_eos": False, "guided_choice": [text]} for text in TEXTS for _ in range(6)]
                streamed = await asyncio.gather(*(stream(client, one, path) for one in wanted))
                answers = await asyncio.gather(*(client.post(path, json=one) for one in wanted))
                for one, found, answer in zip(wanted, streamed, answers, strict=True):
                    (choice,) = answer.json()["choices"]
                    whole = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
                    assert [found.text] == [whole] == one["guided_choice"]
                    assert not any("\ufffd" in piece for piece in found.pieces)
                    assert len(found.pieces) > 5

    asyncio.run(story())
    assert server.end()[0] == 0
