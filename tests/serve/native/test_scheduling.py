"""Who reads when: every answer is what it would be alone, nobody starves, none is stuck, what cannot be is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferry.core.errors import InputError
from ferry.engines.request import Output
from native.reading import Reader, answers, ask, engine_of, greedy, run, tokens_of

BEGINNINGS = [list(range(40)), [*range(16), *range(100, 130)], [7] * 24]


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Prompts that often begin alike."""
    begin = draw(st.sampled_from(BEGINNINGS))
    return begin[: draw(st.integers(1, len(begin)))] + draw(st.lists(st.integers(0, 258), max_size=10))


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(st.tuples(prompts(), st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=12),
    cancelled=st.dictionaries(st.integers(0, 11), st.integers(0, 20)),
    num_blocks=st.integers(8, 24),
    budget=st.integers(1, 40),
    most=st.integers(1, 8),
    prefix_caching=st.booleans(),
)
def test_answers_do_not_depend_on_what_runs_beside_them(
    arrivals: list[tuple[list[int], int, int]],
    cancelled: dict[int, int],
    num_blocks: int,
    budget: int,
    most: int,
    prefix_caching: bool,
) -> None:
    reader = Reader(max_model_len=64)
    engine = engine_of(
        reader,
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=most,
        prefix_caching=prefix_caching,
    )
    outputs: dict[str, list[Output]] = {}
    now = 0
    while engine.has_work or any(when >= now for _, _, when in arrivals):
        for number, (prompt, count, when) in enumerate(arrivals):
            if when == now:
                engine.add(ask(str(number), prompt, max_tokens=count))
            if cancelled.get(number) == now:
                engine.cancel(str(number))
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        assert engine.stats().kv_used <= 1
        now += 1
        assert now < 2000, "it is stuck"
    for number, (prompt, count, _) in enumerate(arrivals):
        made = outputs.get(str(number), [])
        assert tokens_of(made) == greedy(prompt, count)[: len(tokens_of(made))]
        if number not in cancelled:
            assert made[-1].finish == "length"
            assert len(tokens_of(made)) == min(count, reader.max_model_len - len(prompt))
    assert engine.stats().kv_used == 0
    assert all(len(batch.token_ids_T) <= budget for batch in reader.steps)
    assert all(len(batch.context_lens_B) <= most for batch in reader.steps)
    engine.close()


def test_where_blocks_run_out_the_youngest_is_read_again_and_says_the_same() -> None:
    engine = engine_of(Reader(), num_blocks=10, prefix_caching=False)
    asked = [ask(str(number), [number] * 12, max_tokens=40) for number in range(4)]
    assert answers(engine, asked) == {request.id: greedy(request.prompt_ids, 40) for request in asked}
    assert engine.stats().num_preemptions > 0
    engine.close()


def test_the_oldest_is_never_set_back() -> None:
    engine = engine_of(Reader(), num_blocks=10)
    for number in range(4):
        engine.add(ask(str(number), [number] * 12, max_tokens=40))
    first_seen = [output.request_id for _ in range(41) for output in engine.step()]
    assert first_seen.count("0") == 40
    engine.close()


def test_a_long_prompt_does_not_keep_answers_from_growing() -> None:
    engine = engine_of(Reader(), max_num_batched_tokens=16)
    engine.add(ask("short", [1, 2, 3], max_tokens=40))
    engine.step()
    engine.add(ask("long", list(range(200)), max_tokens=1))
    for _ in range(12):
        assert "short" in {output.request_id for output in engine.step()}
    assert tokens_of(run(engine)["long"]) == greedy(range(200), 1)
    engine.close()


def test_requests_begin_in_the_order_they_came() -> None:
    engine = engine_of(Reader(), max_num_seqs=2)
    for number in range(6):
        engine.add(ask(str(number), [number] * 5, max_tokens=3))
    order = list(dict.fromkeys(output.request_id for _ in range(20) for output in engine.step()))
    assert order == sorted(order)
    engine.close()


def test_a_prompt_is_computed_once_for_many_answers_that_came_at_once() -> None:
    reader = Reader()
    engine = engine_of(reader)
    prompt = list(range(36))
    made = answers(engine, [ask(str(number), prompt, max_tokens=4) for number in range(4)])
    assert list(made.values()) == [greedy(prompt, 4)] * 4
    num_read = sum(len(batch.token_ids_T) for batch in reader.steps)
    assert num_read == 36 + 3 * 4 + 4 * 3
    assert engine.stats().num_prefix_hit_tokens == 3 * 32
    engine.close()


def test_a_further_question_finds_the_conversation_before_it() -> None:
    engine = engine_of(Reader())
    first = answers(engine, [ask("first", range(20), max_tokens=20)])["first"]
    conversation = [*range(20), *first]
    engine.add(ask("second", [*conversation, 1, 2], max_tokens=1))
    (output,) = run(engine)["second"]
    # The last token of the first answer was never read, so its block is not whole.
    assert output.num_cached_tokens == 32
    assert output.token_ids == tuple(greedy([*conversation, 1, 2], 1))
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "count", "code"),
    [
        ([], 1, "engine.empty-prompt"),
        ([1] * 65, 0, "engine.too-long"),
        ([1] * 64, 1, "engine.too-long"),
        ([259], 1, "engine.token-id"),
        ([-1], 1, "engine.token-id"),
    ],
)
def test_what_can_never_be_answered_is_refused_when_it_is_added(prompt: list[int], count: int, code: str) -> None:
    engine = engine_of(Reader(max_model_len=64), num_blocks=8)
    with pytest.raises(InputError) as caught:
        engine.add(ask("a", prompt, max_tokens=count))
    assert caught.value.code == code
    assert not engine.has_work
    engine.close()


def test_an_answer_ends_with_the_context() -> None:
    engine = engine_of(Reader(max_model_len=64), num_blocks=8)
    assert answers(engine, [ask("a", [1] * 60, max_tokens=50)]) == {"a": greedy([1] * 60, 4)}
    engine.close()


def test_nothing_is_left_behind_by_ten_thousand_tokens() -> None:
    engine = engine_of(Reader(), num_blocks=40)
    for number in range(40):
        prompt = [number % 7] * (number % 50 + 1)
        assert answers(engine, [ask("a", prompt, max_tokens=5)]) == {"a": greedy(prompt, 5)}
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_used) == (0, 0, 0)
    assert stats.num_generated_tokens == 200
    engine.close()
