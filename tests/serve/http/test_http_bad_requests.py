"""What is wrong with a request is said: status, type, field and reason, in one shape. Nothing is silently ignored."""

from __future__ import annotations

from typing import Any

import pytest
from house import NAME, Door

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": "hi", "max_tokens": 4, **fields}


def talk(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": USER, "max_tokens": 4, **fields}


BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    # model and form
    (COMPLETIONS, text(model="gpt-9"), 404, "model", "'gpt-9' does not exist; this server has small"),
    (CHAT, talk(model="smal"), 404, "model", "(did you mean 'small'?)"),
    (COMPLETIONS, {"model": NAME}, 400, "prompt", "prompt is missing"),
    (CHAT, {"model": NAME}, 400, "messages", "messages is missing"),
    (CHAT, talk(messages=[]), 400, "messages", "at least 1"),
    (COMPLETIONS, text(model=7), 400, "model", "model is 7, expected a text"),
    # prompts
    (COMPLETIONS, text(prompt=""), 400, "prompt", "empty"),
    (COMPLETIONS, text(prompt=[]), 400, "prompt", "empty list"),
    (COMPLETIONS, text(prompt=[[]]), 400, "prompt", "empty"),
    (COMPLETIONS, text(prompt=7), 400, "prompt", "expected a text or a list"),
    (COMPLETIONS, text(prompt=["a", 7]), 400, "prompt[1]", "expected a text"),
    (COMPLETIONS, text(prompt=[5, 999_999]), 400, "prompt", "token id 999999 is not one of the 261"),
    (COMPLETIONS, text(prompt=[-1]), 400, "prompt[0]", "at least 0"),
    (COMPLETIONS, text(prompt="long " * 2000), 400, "prompt", "10,000 tokens"),
    (COMPLETIONS, text(prompt="a" * 30_000), 400, "prompt", "at least 2,308 tokens"),
    (CHAT, talk(messages=[{"role": "user", "content": "a" * 30_000}]), 400, "messages", "at least 2,3"),
    (COMPLETIONS, text(prompt="a" * 21_000), 400, "prompt", "21,000 tokens"),
    (COMPLETIONS, text(prompt=["a"] * 200, n=2), 400, "prompt", "400 answers, more than the 256"),
    (CHAT, talk(web_search_options={}), 400, "web_search_options", "not done"),
    (COMPLETIONS, text(guided_choice=["a", "b"], min_tokens=4), 400, "min_tokens", "ends where it is whole"),
    (COMPLETIONS, text(suffix="."), 400, "suffix", "not done"),
    (CHAT, talk(chat_template="{{ messages }}"), 400, "chat_template", "--chat-template FILE"),
    # lengths
    (COMPLETIONS, text(max_tokens=0), 400, "max_tokens", "at least 1"),
    (COMPLETIONS, text(max_tokens=-1), 400, "max_tokens", "at least 0"),
    (COMPLETIONS, text(max_tokens="7"), 400, "max_tokens", "'7', expected a whole number"),
    (COMPLETIONS, text(max_tokens=2.5), 400, "max_tokens", "expected a whole number"),
    (COMPLETIONS, text(max_tokens=True), 400, "max_tokens", "expected a whole number"),
    (COMPLETIONS, text(max_tokens=5000), 400, "max_tokens", "2,048"),
    (CHAT, talk(max_completion_tokens=5000), 400, "max_completion_tokens", "2,048"),
    (COMPLETIONS, text(min_tokens=5), 400, "min_tokens", "more than max_tokens=4"),
    # sampling
    (COMPLETIONS, text(temperature=-1), 400, "temperature", "temperature is -1, expected at least 0"),
    (COMPLETIONS, text(temperature=3), 400, "temperature", "at most 2"),
    (COMPLETIONS, text(top_p=0), 400, "top_p", "more than 0"),
    (COMPLETIONS, text(top_p=1.5), 400, "top_p", "at most 1"),
    (COMPLETIONS, text(top_k=-2), 400, "top_k", "at least -1"),
    (COMPLETIONS, text(min_p=2), 400, "min_p", "at most 1"),
    (COMPLETIONS, text(presence_penalty=5), 400, "presence_penalty", "at most 2"),
    (COMPLETIONS, text(repetition_penalty=0), 400, "repetition_penalty", "more than 0"),
    (COMPLETIONS, text(n=0), 400, "n", "at least 1"),
    (COMPLETIONS, text(n=2, temperature=0), 400, "n", "2 times the same answer"),
    (COMPLETIONS, text(best_of=3), 400, "best_of", "best_of=3 is not n=1"),
    (COMPLETIONS, text(seed="x"), 400, "seed", "a whole number"),
    (COMPLETIONS, text(logit_bias={"x": 1}), 400, "logit_bias", "expected a token id"),
    (COMPLETIONS, text(logit_bias={"999": 1}), 400, "logit_bias", "token id 999"),
    (COMPLETIONS, text(logit_bias={"9" * 5000: 1}), 400, "logit_bias", "expected a token id"),
    (COMPLETIONS, text(use_beam_search=True), 400, "use_beam_search", "not done"),
    # stops
    (COMPLETIONS, text(stop=""), 400, "stop", "not empty"),
    (COMPLETIONS, text(stop=["a", ""]), 400, "stop[1]", "not empty"),
    (COMPLETIONS, text(stop=["a", "b", "c", "d", "e"]), 400, "stop", "at most 4"),
    (COMPLETIONS, text(stop_token_ids=[999]), 400, "stop_token_ids", "token id 999"),
    # probabilities
    (COMPLETIONS, text(logprobs=50), 400, "logprobs", "at most 20"),
    (CHAT, talk(logprobs=True, top_logprobs=50), 400, "top_logprobs", "at most 20"),
    (CHAT, talk(top_logprobs=2), 400, "top_logprobs", "without logprobs"),
    (COMPLETIONS, text(stream=True, prompt_logprobs=1), 400, "prompt_logprobs", "not streamed"),
    (COMPLETIONS, text(stream_options={"include_usage": True}), 400, "stream_options", "without stream"),
    # messages
    (CHAT, talk(messages=[{"role": "usr", "content": "hi"}]), 400, "messages[0].role", "(did you mean 'user'?)"),
    (CHAT, talk(messages=[{"content": "hi"}]), 400, "messages[0].role", "missing"),
    (CHAT, talk(messages=[{"role": "user"}]), 400, "messages[0].content", "missing"),
    (CHAT, talk(messages=["hi"]), 400, "messages[0]", "expected an object"),
    (
        CHAT,
        talk(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0].type",
        "'image_url', expected 'text'",
    ),
    (
        CHAT,
        talk(messages=[*USER, {"role": "assistant", "tool_calls": [{"function": "zzz"}]}]),
        400,
        "messages",
        'the function of a tool call is "zzz", expected an object',
    ),
    (CHAT, talk(echo=True), 400, "echo", "use /v1/completions"),
    (CHAT, talk(continue_final_message=True), 400, "continue_final_message", "not one of the assistant"),
    # tools
    (CHAT, talk(tool_choice="required"), 400, "tool_choice", "without tools"),
    (CHAT, talk(tools=[TOOL], tool_choice="always"), 400, "tool_choice", "'always', expected none, auto"),
    (
        CHAT,
        talk(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weathr"}}),
        400,
        "tool_choice",
        "(did you mean 'weather'?)",
    ),
    (CHAT, talk(tools=[TOOL, TOOL]), 400, "tools[1].function.name", "two tools"),
    (CHAT, talk(tools=[{"type": "function", "function": {}}]), 400, "tools[0].function.name", "missing"),
    (CHAT, talk(tools=[TOOL], guided_regex="a"), 400, "guided_regex", "beside tools"),
    (CHAT, talk(functions=[{"name": "f"}]), 400, "functions", "use tools"),
    # constraints
    (COMPLETIONS, text(guided_jsn={"type": "object"}), 400, "guided_jsn", "(did you mean 'guided_json'?)"),
    (COMPLETIONS, text(json_schema={"type": "object"}), 400, "json_schema", "(did you mean 'guided_json'?)"),
    (COMPLETIONS, text(structured_output={"json": {}}), 400, "structured_output", "structured_outputs"),
    (COMPLETIONS, text(guided_json="{"), 400, "guided_json", "is not JSON"),
    (COMPLETIONS, text(guided_regex="(a"), 400, "guided_regex", "cannot be"),
    (COMPLETIONS, text(guided_choice=[]), 400, "guided_choice", "at least one"),
    (COMPLETIONS, text(guided_regex="a", guided_choice=["a"]), 400, None, "only one"),
    (COMPLETIONS, text(response_format={"type": "xml"}), 400, "response_format.type", "json_schema"),
    (
        COMPLETIONS,
        text(guided_json={"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}),
        400,
        "guided_json",
        "'uniqueItems' at #/properties/a",
    ),
    (COMPLETIONS, text(guided_json={"type": "strin"}), 400, "guided_json", "'type' at #"),
    # tokens
    ("/tokenize", {"prompt": ["a"]}, 400, "prompt", "expected a text"),
    ("/detokenize", {}, 400, "tokens", "missing"),
    ("/detokenize", {"tokens": ["a"]}, 400, "tokens", "token ids"),
    ("/detokenize", {"tokens": [999]}, 400, "tokens", "token id 999"),
    ("/detokenize", {"tokens": [5] * 131_073}, 400, "tokens", "131,073 tokens, more than 131,072"),
    ("/tokenize", {"prompt": "a" * 131_073}, 400, "prompt", "131,073 tokens, more than 131,072"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), BAD)
def test_a_bad_request_is_told_what_is_wrong(
    door: Door, path: str, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    answer = door.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["param"] == param
    assert words in error["message"]
    assert isinstance(error["code"], str)
    assert error["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is empty"),
        (b"{", "not JSON"),
        (b"[1]", "a JSON array, expected an object"),
        (b"null", "a JSON null"),
        (b'{"prompt": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "\xff"}', "not Unicode"),
        (b'{"prompt": "\\ud800"}', "not Unicode"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_body_that_is_no_object_of_json_is_refused(door: Door, body: bytes, words: str) -> None:
    answer = door.client.post(COMPLETIONS, content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/nothing", 404, "there is no /v1/nothing"),
        ("POST", "/v1/embeddings", 404, "/v1/chat/completions"),
        ("GET", "/v1/completions", 405, "does not take GET"),
        ("DELETE", "/health", 405, "does not take DELETE"),
        ("GET", "/v1/models/gpt-9", 404, "does not exist"),
        ("POST", "/v1/completions/", 404, "there is no /v1/completions/"),
    ],
)
def test_unknown_paths_and_methods_have_the_same_shape(
    door: Door, method: str, path: str, status: int, words: str
) -> None:
    answer = door.client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert words in error["message"]
    assert status != 405 or answer.headers["allow"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(door: Door) -> None:
    def endless() -> Any:
        for _ in range(20):
            yield b" " * 1_000_000

    told = door.client.post(COMPLETIONS, content=b" " * 9_000_000)
    found = door.client.post(COMPLETIONS, content=endless())
    assert [told.status_code, found.status_code] == [413, 413]
    assert "8,000,000 bytes" in told.json()["error"]["message"]


def test_a_field_that_nobody_knows_is_named_in_the_answer(door: Door) -> None:
    answer = door.post(COMPLETIONS, text(foo=1, temprature=0.5)).json()
    assert answer["warnings"] == [
        "'foo' is not a field of this server and was ignored",
        "'temprature' is not a field of this server and was ignored (did you mean 'temperature'?)",
    ]


def test_null_is_a_field_left_out(door: Door) -> None:
    answer = door.post(COMPLETIONS, text(temperature=None, stop=None, suffix=None, guided_json=None, foo=None))
    assert answer.status_code == 200
    assert "warnings" not in answer.json()
