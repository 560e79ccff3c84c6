"""Choices and probabilities against plain formulas, and against transformers' processors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as peer

from ferry.engines.native.choosing import Chooser, Stuck
from ferry.engines.native.sampler import draw, likeliest, logprobs_of, survivors, uniform
from native.reading import NUM_TOKENS, Reader, answers, ask, engine_of, greedy, logits_after, run

ROWS = st.builds(
    lambda seed, size, spread: (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32),
    st.integers(0, 2**32), st.sampled_from([5, 259, 3000]), st.sampled_from([0.1, 1.0, 5.0]),
)  # fmt: skip


def peers_weights(row: np.ndarray, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    scores = torch.from_numpy(row)[None].double()
    ids = torch.zeros(1, 1, dtype=torch.long)
    if min_p:
        scores = peer.MinPLogitsWarper(min_p)(ids, scores)
    if top_k:
        scores = peer.TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = peer.TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(dim=-1)[0].numpy()


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from([0.0, 0.01, 0.3, 1.0]), st.sampled_from([0, 1, 3, 50]), st.floats(0.05, 1.0))
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(
    row: np.ndarray, min_p: float, top_k: int, top_p: float
) -> None:
    ids, weights = survivors(row - row.max(), min_p=min_p, top_k=top_k, top_p=top_p)
    ours = np.zeros(len(row))
    ours[ids] = weights / weights.sum()
    expected = peers_weights(row, min_p, top_k, top_p)
    # Rounding may decide otherwise about one token at the border of a nucleus.
    border = expected[expected > 0].min() + 1e-6
    assert np.abs(ours - expected).max() <= border


@settings(max_examples=80, deadline=None)
@given(ROWS, st.floats(0, 1, exclude_max=True), st.sampled_from([{}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.1}]))
def test_a_draw_is_the_token_where_its_number_falls(row: np.ndarray, number: float, filters: dict[str, Any]) -> None:
    ids, weights = survivors(row - row.max(), **filters)
    token = draw(row - row.max(), number, **filters)
    ends = np.cumsum(weights.astype(np.float64))
    place = ids.tolist().index(token)
    slack = 1e-5 * ends[-1]
    assert ends[place] - weights[place] - slack <= number * ends[-1] <= ends[place] + slack


def test_draws_come_as_often_as_they_are_probable() -> None:
    row = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    drawn = [draw(row - row.max(), uniform(7, place)) for place in range(4000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    # Four standard deviations.
    assert np.abs(shares - np.exp(row)).max() < 4 * math.sqrt(0.25 / 4000)


def test_tokens_without_weight_are_never_drawn() -> None:
    row = np.full(600, -np.inf, np.float32)
    row[[3, 300]] = 0.0
    assert {draw(row.copy(), number) for number in (0.0, 0.4999, 0.5001, 1 - 2**-53)} == {3, 300}


def test_of_equal_logits_the_lowest_tokens_are_first() -> None:
    row = np.zeros(600, np.float32)
    assert likeliest(row, 3).tolist() == [0, 1, 2]
    assert survivors(row.copy(), top_p=0.01)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert logprobs_of(row, 5, 2).rank == 6


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 4), st.integers(0, 5))
def test_logprobs_are_those_of_log_softmax(row: np.ndarray, token: int, num_top: int) -> None:
    expected = torch.from_numpy(row).double().log_softmax(dim=-1).numpy()
    found = logprobs_of(row, token, num_top)
    assert found.logprob == pytest.approx(expected[token], abs=1e-5)
    assert found.rank == int((row > row[token]).sum()) + 1
    assert [top for top, _ in found.top] == np.argsort(-row, kind="stable")[:num_top].tolist()
    assert [value for _, value in found.top] == pytest.approx([expected[top] for top, _ in found.top], abs=1e-5)


def chosen(row: np.ndarray, prompt: list[int], answer: list[int], **sampling: Any) -> int:
    chooser = Chooser(ask("a", prompt, **sampling), len(row), 0)
    for token in answer:
        chooser.take(token)
    return chooser.choose(row, int(row.argmax()), len(answer), np.empty_like(row))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.lists(st.integers(0, 30), max_size=100), st.sampled_from([1.0, 0.7, 1.3]), st.floats(-1, 1), st.floats(-1, 1),
)  # fmt: skip
def test_penalties_follow_their_formulas(
    seed: int, prompt: list[int], answer: list[int], repetition: float, frequency: float, presence: float
) -> None:
    row = np.random.default_rng(seed).standard_normal(31).astype(np.float32)
    before = row.copy()
    scores = torch.from_numpy(row)[None].clone()
    scores = peer.RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([prompt + answer]), scores)
    counts = np.bincount(answer, minlength=31)
    expected = scores[0].numpy() - frequency * counts - presence * (counts > 0)
    token = chosen(
        row, prompt, answer, repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence
    )
    assert expected[token] == pytest.approx(expected.max(), abs=1e-5)
    assert (row == before).all()


def test_biases_and_minimum_lengths_bind() -> None:
    row = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    assert chosen(row, [0], [], logit_bias={3: 9.0}) == 3
    assert chosen(row, [0], [], end_token_ids=(0, 1), min_tokens=2) == 2
    assert chosen(row, [0], [2, 2], end_token_ids=(0, 1), min_tokens=2) == 0
    with pytest.raises(Stuck):
        chosen(row, [0], [], logit_bias=dict.fromkeys(range(4), -math.inf))


def test_a_seeded_answer_is_the_same_alone_and_in_any_company() -> None:
    asked = [
        ask(str(number), range(number + 1), max_tokens=12, temperature=1.5, seed=5, top_p=0.9) for number in range(9)
    ]
    alone = {}
    for request in asked:
        engine = engine_of(Reader())
        alone |= answers(engine, [request])
        engine.close()
    engine = engine_of(Reader(), num_blocks=16, max_num_batched_tokens=7)
    assert answers(engine, asked[::-1]) == alone
    engine.close()


def test_without_a_seed_equal_questions_get_unlike_answers() -> None:
    engine = engine_of(Reader())
    made = answers(engine, [ask(name, [1], max_tokens=12, temperature=1.5) for name in "abcd"])
    assert len({tuple(tokens) for tokens in made.values()}) == 4
    engine.close()


def test_an_end_token_ends_the_answer_and_is_not_in_it() -> None:
    expected = greedy([1, 2], 8)
    engine = engine_of(Reader())
    engine.add(ask("a", [1, 2], max_tokens=8, end_token_ids=(expected[5],)))
    *_, last = outputs = run(engine)["a"]
    assert (last.finish, last.end_token_id, last.token_ids) == ("stop", expected[5], ())
    assert [token for output in outputs for token in output.token_ids] == expected[:5]
    engine.close()


@pytest.mark.parametrize("budget", [3, 512])
def test_probabilities_of_prompt_and_answer_are_those_of_the_logits(budget: int) -> None:
    prompt = list(range(30))
    engine = engine_of(Reader(), max_num_batched_tokens=budget)
    answers(engine, [ask("before", prompt, max_tokens=1)])
    engine.add(ask("a", prompt, max_tokens=2, prompt_logprobs=2, logprobs=0))
    first, second = run(engine)["a"]
    assert first.num_cached_tokens == 0
    assert first.prompt_logprobs == (
        None,
        *(logprobs_of(logits_after(prompt[:place]), prompt[place], 2) for place in range(1, 30)),
    )
    told = (*first.logprobs, *second.logprobs)
    text = prompt + greedy(prompt, 2)
    assert told == tuple(logprobs_of(logits_after(text[:place]), text[place], 0) for place in (30, 31))
    engine.close()


def test_a_prompt_can_be_measured_without_an_answer() -> None:
    engine = engine_of(Reader())
    engine.add(ask("a", [1, 2, 3], max_tokens=0, prompt_logprobs=0))
    (output,) = run(engine)["a"]
    assert (output.finish, output.token_ids, len(output.prompt_logprobs or ())) == ("length", (), 3)
    engine.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_overflowed_end_the_request_and_no_other(value: float) -> None:
    class Overflowing(Reader):
        def forward(self, batch: Any) -> Any:
            rows = super().forward(batch)
            rows[batch.context_lens_B > 20, NUM_TOKENS // 2] = value
            return rows

    engine = engine_of(Overflowing())
    engine.add(ask("short", [1] * 5, max_tokens=10))
    engine.add(ask("long", [1] * 15, max_tokens=10))
    made = run(engine)
    assert made["short"][-1].finish == "length"
    assert (made["long"][-1].finish, made["long"][-1].error_code) == ("error", "engine.not-finite")
    # Float32 has overflowed: a wider type is no remedy.
    assert "--dtype" not in made["long"][-1].error_message
    assert "ferry verify" in made["long"][-1].error_message
    engine.close()
