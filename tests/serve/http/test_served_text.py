"""A model's text: characters are never torn, stop texts do not depend on tokens, templates as the library has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_chat_model import TEMPLATE, byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from ferry.core.errors import InputError
from ferry.engines.chat_template import ChatTemplate
from ferry.engines.text import Detokenizer, StopTexts, open_text
from ferry.engines.vocabulary import Vocabulary

BYTES = Vocabulary(byte_tokenizer(), {})


def pieces_vocabulary() -> Vocabulary:
    """A tokenizer after the manner of SentencePiece, with single bytes to fall back on."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581b"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Vocabulary(tokenizer, {"add_bos_token": True, "bos_token": "<s>"})


PIECES = pieces_vocabulary()


@given(st.text(max_size=30), st.lists(st.integers(1, 4), max_size=60))
def test_text_is_the_same_however_tokens_come(text: str, sizes: list[int]) -> None:
    detokenizer = Detokenizer(BYTES)
    ids = BYTES.encode(text)
    given_out, at = [], 0
    for size in [*sizes, len(ids)]:
        given_out.append(detokenizer.add(ids[at : at + size]))
        at += size
    assert "".join(given_out) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in given_out)


@given(st.text(max_size=20))
def test_pieces_and_bytes_to_fall_back_on_make_the_text(text: str) -> None:
    vocabulary = pieces_vocabulary()
    ids = vocabulary.encode(text.replace("\u2581", ""))
    assert vocabulary.token_bytes(ids[0]) == b"<s>"
    detokenizer = Detokenizer(vocabulary)
    assert "".join(detokenizer.add([one]) for one in ids) == text.replace("\u2581", "")


@given(st.lists(st.text(max_size=20), max_size=4), st.booleans())
def test_many_texts_are_tokens_as_each_of_them_is(texts: list[str], special: bool) -> None:
    for vocabulary in (BYTES, PIECES):
        assert vocabulary.encode_all(texts, special) == [vocabulary.encode(text, special) for text in texts]


def test_the_longest_token_is_known_where_nothing_is_dropped() -> None:
    assert BYTES.longest_bytes == len("<|endoftext|>")
    assert PIECES.longest_bytes is None


def test_a_directory_without_a_tokenizer_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no tokenizer"):
        open_text(tmp_path)


def test_a_letter_that_is_cut_off_by_the_limit_is_left_out() -> None:
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.add(BYTES.encode("aä")[:2]) == "a"


def test_special_tokens_are_left_out_unless_wanted() -> None:
    ids = BYTES.encode("a<|im_start|>b")
    assert Detokenizer(BYTES).add(ids) == "ab"
    assert Detokenizer(BYTES, skip_special_tokens=False).add(ids) == "a<|im_start|>b"
    assert Detokenizer(BYTES, keep=BYTES.special_ids).add(ids) == "a<|im_start|>b"


def test_ids_without_a_token_have_no_text() -> None:
    assert Detokenizer(BYTES).add([5000]) == ""


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.text(alphabet="abc", max_size=30), STOPS, st.booleans(), st.lists(st.integers(1, 5), max_size=30))
def test_stop_texts_do_not_depend_on_pieces(text: str, stops: list[str], include: bool, sizes: list[int]) -> None:
    def run(pieces: list[str]) -> tuple[str, str | None]:
        looking = StopTexts(stops, include=include)
        given_out = ""
        for piece in pieces:
            cut = looking.add(piece)
            given_out += cut.text
            if cut.stop is not None:
                return given_out, cut.stop
        return given_out + looking.finish(), None

    at, pieces = 0, []
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    whole = run([text])
    assert run([*pieces, text[at:]]) == whole
    if whole[1] is None:
        assert whole[0] == text
        assert not any(stop in text for stop in stops)
    else:
        kept = whole[0][: len(whole[0]) - len(whole[1])] if include else whole[0]
        assert text.startswith(kept + whole[1])
        # Before the end of the one that counts, no other was complete.
        assert not any(stop in text[: len(kept) + len(whole[1]) - 1] for stop in stops)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"ä": [1]}}}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "Grüße\n  <b>"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<ä>", "parameters": {"type": "object"}}}]


MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}{{ bos_token }}"


@pytest.mark.parametrize(
    ("source", "messages", "tools"), [(TEMPLATE, MESSAGES, []), (TEMPLATE, MESSAGES, TOOLS), (MARKED, MESSAGES[:2], [])]
)
def test_templates_are_rendered_as_transformers_does(
    small_model: Path, source: str, messages: list[Any], tools: list[Any]
) -> None:
    judge = AutoTokenizer.from_pretrained(small_model)
    text = judge.apply_chat_template(
        messages, tools=tools or None, chat_template=source, add_generation_prompt=True, tokenize=False
    )
    assert ChatTemplate(source, {"bos_token": "<|endoftext|>"}).render(messages, tools) == text


def test_calls_and_tools_that_a_template_does_not_know_become_text() -> None:
    text = ChatTemplate(MARKED, {"bos_token": "."}).render(MESSAGES, TOOLS)
    assert text.startswith('be brief\n\nTools:\n{"type": "function"')
    assert '{"name": "f", "arguments": {"ä": [1]}}' in text


def test_arguments_of_calls_may_be_json_text(small_model: Path) -> None:
    model = open_text(small_model)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"ä": [1]})}}
    written = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert model.render_chat([*MESSAGES[:2], written, MESSAGES[3]]) == model.render_chat(MESSAGES)


def test_what_a_template_refuses_is_an_error_of_the_conversation(small_model: Path) -> None:
    with pytest.raises(InputError, match="no such role"):
        open_text(small_model).render_chat([{"role": "forbidden", "content": "x"}])


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{{ 2.0 ** 5000 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ ''.pop() }}"]
)
def test_a_template_that_breaks_is_an_error_of_the_conversation(source: str) -> None:
    with pytest.raises(InputError, match="chat template refuses"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_template_cannot_leave_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InputError, match="unsafe"):
        template.render([{"role": "user", "content": "x"}])


def test_end_tokens_and_sampling_come_from_the_files_of_the_model(tmp_path: Path, small_model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((small_model / name).read_bytes())
    generation = {"eos_token_id": [256, 258], "temperature": 0.6, "top_k": 20, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = open_text(tmp_path)
    assert model.end_token_ids == (258, 256)
    assert model.default_sampling == {"temperature": 0.6, "top_k": 20}
    assert model.template is None
    with pytest.raises(InputError, match="has no chat template"):
        model.render_chat([{"role": "user", "content": "x"}])
