"""`/v1/chat/completions`, read by the client of OpenAI: streams, probabilities, tools, errors."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from house import NAME, Door
from openai import OpenAI

USER: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/place"}, "days": {"enum": [1, 2, 3]}},
            "required": ["place", "days"],
            "additionalProperties": False,
            "$defs": {"place": {"enum": ["Rome", "Oslo"]}},
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


def test_a_streamed_answer_is_the_answer(openai_client: OpenAI) -> None:
    create = openai_client.chat.completions.create
    whole = create(model=NAME, messages=USER, max_tokens=20, temperature=0)
    chunks = list(
        create(
            model=NAME,
            messages=USER,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_a_wish_usage_is_in_the_last_chunk(openai_client: OpenAI) -> None:
    chunks = list(
        openai_client.chat.completions.create(model=NAME, messages=USER, max_tokens=3, stream=True, n=2, temperature=1)
    )
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}


def test_an_answer_without_a_limit_takes_what_the_context_leaves(openai_client: OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "x" * 1960}]
    answer = openai_client.chat.completions.create(
        model=NAME, messages=asked, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2048
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_of_a_chat_have_bytes_that_make_its_text(openai_client: OpenAI) -> None:
    create = openai_client.chat.completions.create
    answer = create(model=NAME, messages=USER, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 12
    raw = b"".join(bytes(one.bytes or []) for one in found.content)
    assert raw.decode("utf-8", "replace").startswith(answer.choices[0].message.content or "")
    assert all(one.top_logprobs[0].logprob == one.logprob for one in found.content)
    chunks = create(model=NAME, messages=USER, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2, stream=True)
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content or []]
    assert [one.token for one in streamed] == [one.token for one in found.content]


@pytest.mark.parametrize("tools", [[WEATHER], [WEATHER, CLOCK]])
@pytest.mark.parametrize("seed", range(2))
def test_a_required_call_always_parses(openai_client: OpenAI, tools: Any, seed: int) -> None:
    create = openai_client.chat.completions.create
    answer = create(
        model=NAME,
        messages=USER,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=150,
        seed=seed,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["place"] in ("Rome", "Oslo")
        assert arguments["days"] in (1, 2, 3)
    else:
        assert [call.function.name, arguments] == ["clock", {}]
    streamed = create(
        model=NAME,
        messages=USER,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=150,
        seed=seed,
        stream=True,
    )
    deltas = [one for chunk in streamed for one in chunk.choices[0].delta.tool_calls or []]
    assert [(one.index, one.function) for one in deltas] == [(0, deltas[0].function)]
    assert deltas[0].function is not None
    assert json.loads(deltas[0].function.arguments or "") == arguments


def test_a_named_function_is_called_and_its_arguments_stream(openai_client: OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    chunks = list(
        openai_client.chat.completions.create(
            model=NAME,
            messages=USER,
            tools=[CLOCK, WEATHER],
            tool_choice=choice,
            max_tokens=100,
            stream=True,
        )
    )
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id
    assert deltas[0].function is not None
    assert deltas[0].function.name == "weather"
    assert len(deltas) > 3
    json.loads("".join(one.function.arguments or "" for one in deltas if one.function))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_calls_cut_by_the_limit_are_no_text(door: Door) -> None:
    body = {"messages": USER, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 9}
    choice = door.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["guided"]["valid"] is False
    assert choice["guided"]["reason"].startswith("cut off by the limit of tokens")
    assert "tool_calls" not in choice["message"]


def test_strict_tools_keep_their_schema_in_free_text(door: Door) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    found = []
    for seed in range(3):
        body = {"messages": USER, "tools": [strict], "max_tokens": 200, "seed": seed, "logit_bias": {"259": 60}}
        choice = door.post("/v1/chat/completions", body).json()["choices"][0]
        found += choice["message"].get("tool_calls", [])
    assert found
    assert all(json.loads(one["function"]["arguments"])["place"] in ("Rome", "Oslo") for one in found)


def test_a_conversation_with_calls_is_rendered(door: Door) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "Ä"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    made = door.post("/tokenize", {"messages": messages}).json()
    text = door.post("/detokenize", {"tokens": made["tokens"]}).json()["prompt"]
    assert "<|im_start|>system\nbe\nbrief<|im_end|>" in text
    assert '{"name": "clock", "arguments": {"zone": "Ä"}}' in text
    assert "<|im_start|>tool\nnoon<|im_end|>" in text


def test_a_last_message_of_the_assistant_can_go_on(door: Door) -> None:
    messages = [*USER, {"role": "assistant", "content": "The answer is"}]
    made = door.post("/tokenize", {"messages": messages, "continue_final_message": True}).json()
    text = door.post("/detokenize", {"tokens": made["tokens"]}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nThe answer is")


def test_errors_are_those_of_the_client(openai_client: OpenAI) -> None:
    create = openai_client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-9", messages=USER)
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        create(model=NAME, messages=USER, max_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as streamed:
        create(model=NAME, messages=USER, stream=True, extra_body={"guided_regex": "(?=a)"})
    assert streamed.value.param == "guided_regex"


def test_the_model_is_listed_without_its_path(openai_client: OpenAI, door: Door, small_model: Any) -> None:
    (listed,) = openai_client.models.list().data
    assert listed.id == NAME
    assert openai_client.models.retrieve(NAME).id == NAME
    assert str(small_model) not in door.client.get("/v1/models").text
