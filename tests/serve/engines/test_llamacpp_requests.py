"""llama.cpp's answers as token ids, also where its stream leaves some out; and who waits for room in its cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ferry.engines.grammar_guard import GrammarGuard
from ferry.engines.llamacpp_process import _Room
from ferry.engines.llamacpp_requests import Stream, body_of, ids_by_bytes, missing, split, whole_answer
from ferry.engines.request import Output, Request, Sampling
from ferry.engines.text import TextModel, open_text
from ferry.guided.building import build
from ferry.guided.refusal import Refusal
from ferry.guided.request import constraint_of


@pytest.fixture(scope="module")
def text(smollm2: Path) -> TextModel:
    return open_text(smollm2)


@pytest.fixture(scope="module")
def ids(text: TextModel) -> dict[bytes, int]:
    return ids_by_bytes(text.vocabulary, text.vocabulary.num_tokens)


def pieces(text: TextModel, tokens: list[int], stop_type: str) -> list[dict[str, Any]]:
    """Return the stream that llama.cpp makes of tokens: nothing while a character is not whole."""
    found: list[dict[str, Any]] = []
    data, sent = b"", 0
    for number, token in enumerate(tokens, 1):
        special = token in text.vocabulary.special_ids
        data += b"" if special else text.vocabulary.token_bytes(token)
        try:
            content = data[sent:].decode()
        except UnicodeDecodeError:
            continue
        sent = len(data)
        found.append({"content": content, "tokens": [token], "stop": False, "tokens_predicted": number})
    last = {"content": "", "tokens": [], "stop": True, "stop_type": stop_type, "tokens_predicted": len(tokens)}
    return [*found, {**last, "timings": {"cache_n": 15}}]


def streamed(
    text: TextModel, ids: dict[bytes, int], tokens: list[int], stop_type: str, **sampling: Any
) -> list[Output]:
    stream = Stream(Request("r", (1,), Sampling(**sampling)), text.vocabulary, ids)
    found: list[Output] = []
    for piece in pieces(text, tokens, stop_type):
        output = stream.take(piece)
        if output is not None:
            found.append(output)
        if output is not None and output.finish:
            break
    return found


def all_tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("said", ["plain words", "漢字テスト", "a 😀🎉 b", "é ñ", "👩‍👩‍👧 family"])
def test_characters_of_several_tokens_come_whole_and_with_all_their_tokens(
    text: TextModel, ids: dict[bytes, int], said: str
) -> None:
    tokens = text.encode(said, False)
    outputs = streamed(text, ids, [*tokens, 2], "eos")
    assert text.decode(all_tokens(outputs)) == said
    assert len(all_tokens(outputs)) == len(tokens)
    assert (outputs[-1].finish, outputs[-1].end_token_id, outputs[-1].num_cached_tokens) == ("stop", 2, 15)


def test_an_end_token_of_the_request_ends_the_answer(text: TextModel, ids: dict[bytes, int]) -> None:
    tokens = text.encode("The capital of France is Paris.", False)
    outputs = streamed(text, ids, tokens, "limit", end_token_ids=(tokens[3],))
    assert all_tokens(outputs) == tokens[:3]
    assert (outputs[-1].finish, outputs[-1].end_token_id) == ("stop", tokens[3])


def test_a_special_token_in_the_middle_is_kept(text: TextModel, ids: dict[bytes, int]) -> None:
    tokens = [*text.encode("one", False), 1, *text.encode("two", False)]
    outputs = streamed(text, ids, tokens, "limit")
    assert all_tokens(outputs) == tokens
    assert outputs[-1].finish == "length"


def test_bytes_are_split_into_just_so_many_tokens() -> None:
    ids = {b"a": 1, b"b": 2, b"ab": 3, b"c": 4}
    assert split(b"abc", 2, ids) == [3, 4]
    assert split(b"abc", 3, ids) == [1, 2, 4]
    assert split(b"abc", 1, ids) is None
    assert split(b"", 0, ids) == []


def test_an_answer_with_log_probabilities_comes_in_one_piece() -> None:
    request = Request("r", (1, 2), Sampling(logprobs=1, end_token_ids=(9,)))
    assert body_of(request, 100, prefix_caching=True)["stream"] is False
    top = [{"id": 5, "logprob": -0.1}, {"id": 6, "logprob": -2.0}]
    said = {
        "tokens": [6, 9], "stop_type": "eos",
        "completion_probabilities": [{"id": 6, "logprob": -2.0, "top_logprobs": top}] * 2,
    }  # fmt: skip
    output = whole_answer(request, said)
    assert (output.token_ids, output.finish, output.end_token_id) == ((6,), "stop", 9)
    assert [(each.token_id, each.rank, each.top) for each in output.logprobs] == [(6, 2, ((5, -0.1),))]


def test_what_llamacpp_means_in_another_way_is_named() -> None:
    assert missing(Sampling()) == []
    asked = Sampling(prompt_logprobs=1, min_tokens=2, presence_penalty=0.1, frequency_penalty=0.1)
    assert missing(asked) == ["prompt_logprobs", "min_tokens", "presence_penalty", "frequency_penalty"]


def test_the_order_of_sampling_is_the_contracts() -> None:
    body = body_of(Request("r", (1,), Sampling(temperature=0.5, logit_bias={3: 1.0}, seed=7)), 64, prefix_caching=False)
    assert body["samplers"] == ["penalties", "temperature", "min_p", "top_k", "top_p"]
    assert (body["logit_bias"], body["seed"], body["cache_prompt"], body["n_predict"]) == ([[3, 1.0]], 7, False, 16)


def test_an_answer_that_leaves_its_grammar_is_noticed(text: TextModel) -> None:
    constraint = constraint_of({"guided_choice": ["Positive", "Negative"]})
    assert constraint is not None
    guard = GrammarGuard(text, text.vocabulary.num_tokens)
    lark = build(constraint, lambda: None).lark

    async def story() -> None:
        first, second = await asyncio.gather(guard.watch(lark), guard.watch(lark))
        assert first.keeps(text.encode("Positive", False))
        assert not second.keeps(text.encode("Positively", False))
        for _ in range(2):
            with pytest.raises(Refusal):
                await guard.watch("start: @@")

    asyncio.run(story())


def test_requests_wait_for_room_and_come_in_turn() -> None:
    async def story() -> None:
        room = _Room(100, 4)
        order: list[str] = []
        may_go = asyncio.Event()

        async def hold(name: str, tokens: int) -> None:
            async with room.taken(tokens):
                order.append(name)
                await may_go.wait()

        first = asyncio.create_task(hold("first", 70))
        await asyncio.sleep(0)
        large = asyncio.create_task(hold("large", 500))
        small = asyncio.create_task(hold("small", 10))
        gone = asyncio.create_task(hold("gone", 10))
        await asyncio.sleep(0)
        assert (order, room.num_waiting) == (["first"], 3)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert room.num_waiting == 2
        may_go.set()
        await asyncio.gather(first, large, small)
        assert (order, room.num_waiting, room.share_taken) == (["first", "large", "small"], 0, 0.0)

    asyncio.run(story())
