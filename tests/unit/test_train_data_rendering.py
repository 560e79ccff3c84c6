"""The supervised part of a sample is exact: the answer and its end-of-turn token, on every kind of template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferry.core.errors import InputError
from ferry.data.conversation import BadRow, Conversation, Message, Text
from ferry.data.rendering import Renderer, RendererSpec, renderer, tokenizer_sha256
from ferry.data.samples import samples_text, shown

TALK = Conversation(
    (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "1+1"), Message("assistant", "2 é 你好"))
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1] %}"
    "{% if loop.last %}{{ '<think>' + m.content.split('</think>')[0] + '</think>' + c if '</think>' in m.content "
    "else '<think></think>' + c }}{% else %}{{ c }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Like templates of reasoning models: the last answer is written with its reasoning, an earlier one without."""


@pytest.fixture(scope="module")
def own(smollm2: Path) -> Renderer:
    return renderer(RendererSpec(smollm2, "assistant"))


def with_template(own: Renderer, template: str, **changes: Any) -> Renderer:
    return Renderer(replace(own.spec, chat_template=template, template_name="t.jinja", **changes), own.tokenizer)


def learned(renderer: Renderer, conversation: Conversation) -> list[str]:
    """Return the supervised parts as text, read back from tokens."""
    return [text for text, is_learned in shown(renderer.encode(conversation), renderer.tokenizer) if is_learned]


def test_an_answer_and_its_end_of_turn_token_are_learned_and_nothing_else(own: Renderer) -> None:
    sample = own.encode(TALK)
    text = own.tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in TALK.messages], tokenize=False
    )
    assert own.tokenizer.decode(sample.ids_T) == text
    assert learned(own, TALK) == ["Yes?<|im_end|>", "2 é 你好<|im_end|>"]


def test_which_turns_are_learned_can_be_chosen(own: Renderer) -> None:
    assert learned(with_template(own, own.template, train_on="last"), TALK) == ["2 é 你好<|im_end|>"]
    assert with_template(own, own.template, train_on="all").encode(TALK).supervised_T.all()
    quiet = replace(TALK, messages=(TALK.messages[0], replace(TALK.messages[1], is_target=False), *TALK.messages[2:]))
    assert learned(own, quiet) == ["2 é 你好<|im_end|>"]
    assert learned(with_template(own, CHATML), quiet) == ["2 é 你好<|im_end|>"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_spans_found_by_rendering_are_those_that_transformers_finds_by_marks(
    own: Renderer, turns: list[tuple[str, str]]
) -> None:
    messages = [message for q, a in turns for message in (Message("user", q), Message("assistant", a))]
    conversation = Conversation((Message("system", "s"), *messages))
    marked = own.tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in conversation.messages],
        chat_template=CHATML,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    for template in (own.template, CHATML):
        sample = with_template(own, template).encode(conversation)
        assert sample.ids_T.tolist() == marked["input_ids"]
        assert sample.supervised_T.astype(int).tolist() == marked["assistant_masks"]


def test_an_earlier_answer_written_without_its_reasoning_is_still_found(own: Renderer) -> None:
    thinking = with_template(own, THINKING)
    assert learned(thinking, TALK) == ["Yes?<|im_end|>", "<think></think>2 é 你好<|im_end|>"]


def test_a_template_that_hides_what_is_to_be_learned_is_refused_by_name(own: Renderer) -> None:
    hidden = replace(TALK, messages=(TALK.messages[0], Message("assistant", "hm</think>Yes?"), *TALK.messages[2:]))
    with pytest.raises(InputError, match=r"t\.jinja writes a conversation differently once it goes on") as caught:
        with_template(own, THINKING).encode(hidden)
    assert caught.value.code == "data.template-unstable"
    assert learned(with_template(own, THINKING, train_on="last"), hidden) == ["<think></think>2 é 你好<|im_end|>"]


def test_a_template_whose_generation_prompt_is_not_in_the_text_is_refused(own: Renderer) -> None:
    template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = template.replace(
        "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    with pytest.raises(InputError, match="turn 2") as caught:
        with_template(own, template).encode(TALK)
    assert caught.value.code == "data.template-unstable"


def test_without_a_chat_template_a_conversation_is_refused_and_a_text_is_not(own: Renderer) -> None:
    bare = with_template(own, own.template)
    bare.template = ""
    with pytest.raises(InputError, match="no chat template") as caught:
        bare.encode(TALK)
    assert caught.value.code == "data.no-template"
    assert bare.encode(Text("Once.")).ids_T[-1] == own.tokenizer.eos_token_id


def test_a_row_that_the_template_refuses_is_a_bad_row_with_its_words(own: Renderer) -> None:
    with pytest.raises(BadRow, match="no system here"):
        with_template(own, "{{ raise_exception('no system here') }}").encode(TALK)
    with pytest.raises(InputError, match="mistake in line 1"):
        with_template(own, "{% for %}").encode(TALK)


def test_calls_and_tools_that_the_template_does_not_know_are_written_as_text(own: Renderer) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = Conversation(
        (
            Message("user", "1+1"),
            Message("assistant", tool_calls=(call,)),
            Message("tool", "2"),
            Message("assistant", "2"),
        ),
        tools=({"type": "function", "function": {"name": "add"}},),
    )
    text, _ = own.render(conversation)
    assert '<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "add"}}<|im_end|>' in text
    assert learned(own, conversation) == ['{"name": "add", "arguments": {"a": 1}}<|im_end|>', "2<|im_end|>"]
    assert any("no place for tools" in choice for choice in own.choices({"sharegpt"}))


def test_a_template_with_a_clock_gives_the_same_tokens_on_every_day(own: Renderer) -> None:
    clocked = with_template(own, '{{ strftime_now("%d %b %Y") }}' + own.template)
    assert clocked.render(TALK)[0].startswith("26 Jul 2024<|im_start|>")
    assert any("2024-07-26" in choice for choice in clocked.choices({"alpaca"}))


def test_a_text_is_learned_whole_and_ends_unless_it_goes_on(own: Renderer) -> None:
    whole, piece = own.encode(Text("Once upon")), own.encode(Text("Once upon", is_complete=False))
    assert whole.ids_T.tolist() == [*piece.ids_T.tolist(), own.tokenizer.eos_token_id]
    assert whole.supervised_T.all()


def test_a_tokenizer_without_offsets_gives_the_same_spans(own: Renderer) -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    assert not slow.is_fast
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '|' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    renderer = Renderer(replace(own.spec, chat_template=template), slow)
    assert learned(renderer, TALK) == ["Yes?|", "2 é 你好|"]


def test_the_digest_of_a_tokenizer_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer_sha256(tmp_path)
    (tmp_path / "model.safetensors").write_text("weights")
    assert tokenizer_sha256(tmp_path) == first
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_sha256(tmp_path) != first


def test_samples_are_shown_with_the_supervised_part_marked(own: Renderer) -> None:
    spans = shown(own.encode(TALK), own.tokenizer)
    assert "".join(text for text, _ in spans) == own.render(TALK)[0]
    text = samples_text([spans])
    assert "<|im_start|>assistant\n⟦Yes?<|im_end|>⟧\n<|im_start|>user\n1+1" in text
    assert "[... 900 characters ...]" in samples_text([[("x" * 1000, True)]], max_chars=100)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        renderer(RendererSpec(tmp_path, "assistant"))
    assert caught.value.code == "data.tokenizer"


def test_supervision_is_one_value_a_token(own: Renderer) -> None:
    sample = own.encode(TALK)
    assert sample.ids_T.dtype == np.int32
    assert sample.supervised_T.dtype == np.bool_
    assert len(sample.ids_T) == len(sample.supervised_T)
