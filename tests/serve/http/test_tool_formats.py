"""Calls of tools are found in an answer however it was cut into pieces, and nothing of the text around them is lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.verbs.serve.http.tool_formats import FORMATS, CallReader, format_of
from ferry.verbs.serve.http.tools import CallList

TAGGED, LISTED, BARE = FORMATS
ANSWERS = [
    (TAGGED, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", ['f {"a": 1}']),
    (TAGGED, 'Let me see.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "Let me see.\n", ["f {}"]),
    (
        TAGGED,
        '<tool_call>\n{"name": "f", "arguments": {"a": "</"}}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>',
        "",
        ['f {"a": "</"}', "g {}"],
    ),
    (TAGGED, "1 < 2 and <tool> is no call", "1 < 2 and <tool> is no call", []),
    (TAGGED, '<tool_call>{"name": </tool_call>!', '<tool_call>{"name": </tool_call>!', []),
    (TAGGED, '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    (LISTED, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]', "", ['f {"a": 1}', "g {}"]),
    (LISTED, 'I call.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', "I call.", ['f {"a": 1}', "g {}"]),
    (LISTED, "[1, 2] [TOOL] is text", "[1, 2] [TOOL] is text", []),
    (BARE, '{"name": "f", "parameters": {"a": 1}}', "", ['f {"a": 1}']),
    (BARE, '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", ["f {}", "g {}"]),
    (BARE, "{braces} are text", "{braces} are text", []),
    (BARE, 'text, then {"name": "f", "parameters": {}}', 'text, then {"name": "f", "parameters": {}}', []),
]  # fmt: skip


def read(form: object, pieces: list[str]) -> tuple[str, list[str]]:
    reader = CallReader(form)  # type: ignore[arg-type]
    found = [*map(reader.add, pieces), reader.finish()]
    calls = [f"{call.name} {call.arguments}" for one in found for call in one.calls]
    return "".join(one.text for one in found), calls


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
def test_calls_and_text_are_parted(form: object, answer: str, text: str, calls: list[str]) -> None:
    assert read(form, [answer]) == (text, calls)
    assert read(form, list(answer)) == (text, calls)


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 200), max_size=6))
def test_pieces_do_not_matter(row: tuple[object, str, str, list[str]], cuts: list[int]) -> None:
    form, answer, text, calls = row
    edges = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    assert read(form, [answer[a:b] for a, b in pairwise(edges)]) == (text, calls)


@given(st.sampled_from(FORMATS), st.text(alphabet='<tol_ca>/[TOOL_CALLS]{"name":} \n;', max_size=60))
def test_text_without_a_call_is_not_lost(form: object, answer: str) -> None:
    text, calls = read(form, list(answer))
    assert calls or text == answer


def test_a_second_call_is_dropped_where_one_is_wanted() -> None:
    answer = 'x<tool_call>{"name": "f"}</tool_call>y<tool_call>{"name": "g"}</tool_call>z'
    for pieces in ([answer], list(answer)):
        reader = CallReader(TAGGED, only_one=True)
        found = [*map(reader.add, pieces), reader.finish()]
        assert [call.name for one in found for call in one.calls] == ["f"]


def test_arguments_that_are_a_text_stay_as_they_are() -> None:
    body = json.dumps({"name": "f", "arguments": '{"a": 1}'})
    assert read(TAGGED, [f"<tool_call>{body}</tool_call>"]) == ("", ['f {"a": 1}'])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("...<tool_call>\n{{ call }}\n</tool_call>", TAGGED),
        ("<tool_call>\n<function=f>", None),
        ("[TOOL_CALLS] {{ calls }}", LISTED),
        ('Respond in the format {"name": function name, "parameters": dictionary}', BARE),
        ("{{ tools }}", None),
    ],
)
def test_the_template_shows_the_form(template: str, form: object) -> None:
    assert format_of(template) is form


@given(st.integers(1, 40))
def test_a_list_of_calls_is_read_while_it_comes(size: int) -> None:
    wanted = [("f", '{"a":{"}":"[{"}}'), ("g", "{}"), ("f", '{"b":[{},{}]}')]
    text = ", ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in wanted)
    for whole, calls in ((f"[{text}]", wanted), (f"[{text[:-3]}", wanted[:-1])):
        reader, found = CallList(), []
        for at in range(0, len(whole), size):
            found += reader.add(whole[at : at + size])
        assert [(call.name, call.arguments) for call in found] == calls
