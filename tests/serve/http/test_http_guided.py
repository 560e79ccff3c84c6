"""What a schema says is what comes out over HTTP, or the request is refused, or the answer says that it was cut."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from house import NAME, Door, served_by_command
from openai import OpenAI
from pydantic import BaseModel

from ferry.verbs.serve.config import ServeConfig

# The body of the manual's example, as curl sends it; only the name of the model is filled in.
MANUAL = r"""{
"model": "${container_model_path}",
"prompt": "Meet our valorous character, named Knight, who has reached the age of 32. Clad in impenetrable plate armor, Knight is well-prepared for any battle. Armed with a trusty sword and boasting a strength score of 90, this character stands as a formidable warrior on the field.Please provide details for this character, including their Name, Age, preferred Armor, Weapon, and Strength",
"max_tokens": 200,
"temperature": 0,
"guided_json": "{\"title\": \"Character\", \"type\": \"object\", \"properties\": {\"name\": {\"title\": \"Name\", \"maxLength\": 10, \"type\": \"string\"}, \"age\": {\"title\": \"Age\", \"type\": \"integer\"}, \"armor\": {\"$ref\": \"#/definitions/Armor\"}, \"weapon\": {\"$ref\": \"#/definitions/Weapon\"}, \"strength\": {\"title\": \"Strength\", \"type\": \"integer\"}}, \"required\": [\"name\", \"age\", \"armor\", \"weapon\", \"strength\"], \"definitions\": {\"Armor\": {\"title\": \"Armor\", \"description\": \"An enumeration.\", \"enum\": [\"leather\", \"chainmail\", \"plate\"], \"type\": \"string\"}, \"Weapon\": {\"title\": \"Weapon\", \"description\": \"An enumeration.\", \"enum\": [\"sword\", \"axe\", \"mace\", \"spear\", \"bow\", \"crossbow\"], \"type\": \"string\"}}}"
}"""  # noqa: E501
CHARACTER = json.loads(json.loads(MANUAL)["guided_json"])
SMALL = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "tags": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
    },
    "required": ["colour", "tags"],
    "additionalProperties": False,
}


def kept(choice: dict[str, Any], schema: Any) -> bool:
    """Return whether an answer says rightly that it keeps a schema, or that it does not."""
    verdict = choice["guided"]
    if verdict["valid"]:
        jsonschema.validate(json.loads(choice["text"]), schema)
        return True
    assert choice["finish_reason"] == "length"
    assert verdict["reason"].startswith("cut off by the limit of tokens: ")
    return False


def test_the_curl_of_the_manual_is_answered_under_its_schema(door: Door, small_model: Any) -> None:
    body = MANUAL.replace("${container_model_path}", str(small_model))
    answer = door.client.post("/v1/completions", content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert answer.json()["model"] == str(small_model)
    kept(answer.json()["choices"][0], CHARACTER)
    # A random model at temperature 0 may repeat a digit until the limit; by chance it comes to an end.
    warm = [{**json.loads(body), "temperature": 1, "seed": seed} for seed in range(4)]
    choices = [door.post("/v1/completions", one).json()["choices"][0] for one in warm]
    assert sum(kept(choice, CHARACTER) for choice in choices) > 0


@pytest.mark.parametrize(
    "constraint",
    [
        {"guided_json": SMALL},
        {"structured_outputs": {"json": SMALL}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SMALL}}},
    ],
)
def test_all_names_of_a_schema_mean_the_same(door: Door, constraint: dict[str, Any]) -> None:
    answer = door.post("/v1/completions", {"prompt": "hi", "max_tokens": 100, "temperature": 0, **constraint}).json()
    assert kept(answer["choices"][0], SMALL)
    assert answer["choices"][0]["guided"] == {"valid": True}
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        ({"guided_choice": ["Positive", "Negative"]}, {"Positive", "Negative"}),
        ({"guided_regex": "[ab]x"}, {"ax", "bx"}),
        ({"guided_grammar": 'start: "yes" | "no"'}, {"yes", "no"}),
        ({"structured_outputs": {"choice": ["ä", "日"]}}, {"ä", "日"}),
    ],
)
def test_choices_patterns_and_grammars_are_kept(door: Door, constraint: dict[str, Any], texts: set[str]) -> None:
    for seed in range(3):
        body = {"prompt": "hi", "max_tokens": 20, "seed": seed, "temperature": 1.5, **constraint}
        choice = door.post("/v1/completions", body).json()["choices"][0]
        assert choice["text"] in texts
        assert choice["guided"] == {"valid": True}


def test_a_stream_ends_with_the_verdict(door: Door) -> None:
    body = {"prompt": "hi", "stream": True, "temperature": 0, "guided_json": SMALL}
    with door.client.stream("POST", "/v1/completions", json={**body, "max_tokens": 100}) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    last = lines[-1]["choices"][0]
    assert last["finish_reason"] == "stop"
    assert last["guided"] == {"valid": True}
    jsonschema.validate(json.loads("".join(line["choices"][0]["text"] for line in lines)), SMALL)
    with door.client.stream("POST", "/v1/completions", json={**body, "max_tokens": 3}) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert lines[-1]["choices"][0]["finish_reason"] == "length"
    assert lines[-1]["choices"][0]["guided"]["valid"] is False


def test_a_stop_text_inside_a_constrained_answer_is_said(door: Door) -> None:
    body = {"prompt": "hi", "max_tokens": 100, "temperature": 0, "guided_json": SMALL, "stop": '"'}
    choice = door.post("/v1/completions", body).json()["choices"][0]
    assert [choice["text"], choice["finish_reason"], choice["stop_reason"]] == ["{", "stop", '"']
    assert choice["guided"]["valid"] is False
    assert "cut off by '\"'" in choice["guided"]["reason"]


def test_what_was_narrowed_is_said(door: Door) -> None:
    schema = {"type": "string", "maxLength": 3, "format": "colour"}
    answer = door.post("/v1/completions", {"prompt": "hi", "max_tokens": 50, "guided_json": schema}).json()
    assert any("colour" in warning for warning in answer["warnings"])


def test_the_client_of_openai_parses_an_answer(openai_client: OpenAI) -> None:
    class Pick(BaseModel):
        right: bool

    answer = openai_client.chat.completions.parse(
        model=NAME, messages=[{"role": "user", "content": "hi"}], response_format=Pick, temperature=0, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, Pick)


def test_many_schemas_at_once_are_all_kept(door: Door, house: Any) -> None:
    import asyncio

    import httpx

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=door.url, timeout=60) as client:
            return await asyncio.gather(
                *(
                    client.post(
                        "/v1/completions",
                        json={"prompt": "hi", "max_tokens": 40, "guided_json": {"const": [number, "x" * number]}},
                    )
                    for number in range(24)
                )
            )

    for number, answer in enumerate(asyncio.run(ask())):
        assert json.loads(answer.json()["choices"][0]["text"]) == [number, "x" * number]


@pytest.mark.slow
def test_the_manual_works_as_written(smollm2: Path, tmp_path: Path) -> None:
    assert ServeConfig.model_fields["port"].default == 8080
    with served_by_command(smollm2, tmp_path) as (_, url):
        body = MANUAL.replace("${container_model_path}", str(smollm2))
        command = ["curl", "-sX", "POST", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        choice = json.loads(told.stdout)["choices"][0]
        assert choice["text"].startswith('{"name":"Knight","age":32,"armor":')
        assert choice["finish_reason"] == "stop"
        assert kept(choice, CHARACTER)
        for sampling in ({}, *({"temperature": 0.5, "seed": seed} for seed in range(6))):
            answer = httpx.post(f"{url}/v1/completions", json={**json.loads(body), **sampling}, timeout=120)
            assert kept(answer.json()["choices"][0], CHARACTER), answer.json()["choices"][0]
