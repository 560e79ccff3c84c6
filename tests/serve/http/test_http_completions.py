"""`/v1/completions`: every form of a prompt, and what comes back with the text. The client of OpenAI reads it."""

from __future__ import annotations

import math

import pytest
from house import NAME, Door, House
from openai import OpenAI


def test_the_four_forms_of_a_prompt_give_the_same_answers(openai_client: OpenAI, house: House) -> None:
    texts = ["one two", "three"]
    tokens = [house.model.encode(text) for text in texts]
    create = openai_client.completions.create
    answers = [create(model=NAME, prompt=one, max_tokens=6, temperature=0) for one in (texts, tokens)]
    singles = [create(model=NAME, prompt=one, max_tokens=6, temperature=0) for one in (texts[0], tokens[0])]
    both = [[choice.text for choice in answer.choices] for answer in answers]
    assert both[0] == both[1]
    assert [answer.choices[0].text for answer in singles] == [both[0][0]] * 2
    assert [choice.index for choice in answers[0].choices] == [0, 1]
    assert answers[0].usage is not None
    assert answers[0].usage.prompt_tokens == sum(map(len, tokens))
    assert answers[0].usage.completion_tokens == 12
    assert answers[0].usage.prompt_tokens_details is not None


def test_without_max_tokens_a_completion_has_sixteen(door: Door) -> None:
    answer = door.post("/v1/completions", {"prompt": "hi", "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_n_answers_with_a_seed_differ_and_come_again(openai_client: OpenAI) -> None:
    create = openai_client.completions.create
    first, again = (
        create(model=NAME, prompt="hi", n=3, seed=5, temperature=1.5, max_tokens=12, stream=False) for _ in range(2)
    )
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in again.choices]


def test_logprobs_are_those_of_the_tokens_and_sum_to_at_most_one(openai_client: OpenAI) -> None:
    answer = openai_client.completions.create(model=NAME, prompt="hi", max_tokens=5, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 5
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top is not None
        assert token in top
        assert len(top) == 3
        assert logprob == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1.0001


def test_echo_with_logprobs_gives_the_prompt_its_probabilities(door: Door, house: House) -> None:
    body = {"prompt": "grün", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    choice = door.post("/v1/completions", body).json()["choices"][0]
    found = choice["logprobs"]
    ids = house.model.encode("grün")
    assert choice["text"].startswith("grün")
    assert len(found["tokens"]) == len(ids) + 1
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(one <= 0 for one in found["token_logprobs"][1:])
    # The letter of two bytes: neither of its tokens is a text.
    assert found["tokens"][2:4] == ["bytes:\\xc3", "bytes:\\xbc"]
    assert found["text_offset"][:5] == [0, 1, 2, 2, 3]


def test_only_the_prompt_is_judged_when_nothing_is_to_be_generated(door: Door) -> None:
    body = {"prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = door.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == "hello"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 5
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_come_by_token_id_with_rank(door: Door, house: House) -> None:
    choice = door.post("/v1/completions", {"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 2}).json()["choices"][0]
    found = choice["prompt_logprobs"]
    ids = house.model.encode("abc")
    assert found[0] is None
    assert [str(token) in line for token, line in zip(ids[1:], found[1:], strict=True)] == [True, True]
    entry = found[1][str(ids[1])]
    assert entry["decoded_token"] == "b"
    assert entry["rank"] >= 1


def test_a_stop_text_ends_the_answer_before_itself_or_behind(door: Door) -> None:
    body = {"prompt": "hi", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    whole = door.post("/v1/completions", body).json()["choices"][0]["text"]
    stop = whole[3:5]
    cut = door.post("/v1/completions", {**body, "stop": [stop]}).json()["choices"][0]
    kept = door.post("/v1/completions", {**body, "stop": stop, "include_stop_str_in_output": True}).json()["choices"][0]
    at = whole.index(stop)
    assert [cut["text"], kept["text"]] == [whole[:at], whole[: at + len(stop)]]
    assert [cut["finish_reason"], cut["stop_reason"]] == ["stop", stop]
    late = door.post("/v1/completions", {**body, "stop": stop, "min_tokens": 30}).json()["choices"][0]
    assert late["text"] == whole


def test_a_stop_token_is_named_and_counted(door: Door, house: House) -> None:
    body = {"prompt": "hi", "max_tokens": 30, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    ids = door.post("/v1/completions", body).json()["choices"][0]["token_ids"]
    answer = door.post("/v1/completions", {**body, "stop_token_ids": [ids[2]]}).json()
    choice = answer["choices"][0]
    assert choice["stop_reason"] == ids[2]
    assert choice["token_ids"] == ids[: ids.index(ids[2])]
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"]) + 1


def test_a_prompt_can_be_cut_at_its_front(door: Door) -> None:
    body = {"prompt": "0123456789", "max_tokens": 1, "truncate_prompt_tokens": 4, "return_token_ids": True}
    answer = door.post("/v1/completions", body).json()
    assert answer["usage"]["prompt_tokens"] == 4


def test_a_bias_forces_a_token(door: Door, house: House) -> None:
    (token,) = house.model.encode("z")
    body = {"prompt": "hi", "max_tokens": 3, "temperature": 0, "logit_bias": {str(token): 100}}
    assert door.post("/v1/completions", body).json()["choices"][0]["text"] == "zzz"


@pytest.mark.parametrize("text", ["Straße 日本 \U0001f469\u200d\U0001f467 \x00 <|im_end|>", "a" * 500])
def test_text_comes_back_from_its_tokens(door: Door, text: str) -> None:
    made = door.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert door.post("/detokenize", {"tokens": made["tokens"]}).json()["prompt"] == text


def test_a_conversation_is_tokenized_with_its_template(door: Door, house: House) -> None:
    messages = [{"role": "user", "content": "hi"}]
    made = door.post("/tokenize", {"messages": messages}).json()
    assert house.model.decode(made["tokens"], skip_special_tokens=False) == house.model.render_chat(messages)
