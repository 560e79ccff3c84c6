"""From a request to a checked answer: compiled, written token by token, judged at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from ferry.guided import building
from ferry.guided.byte_tokenizer import END, byte_tokenizer
from ferry.guided.compiling import Compiled, Compiler, tokenizer_of
from ferry.guided.matcher import Matcher, tokens_of
from ferry.guided.refusal import Refusal
from ferry.guided.request import Constraint, constraint_of
from ferry.guided.validate import check

PAIR = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer"}}, "required": ["a", "b"]}
CLOSED = {**PAIR, "additionalProperties": False}
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=add>", "schema": CLOSED, "end": "</f>"}],
    "triggers": ["<f="],
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler(byte_tokenizer())
    yield compiler
    compiler.close()


def compiled(compiler: Compiler, **request: Any) -> Compiled:
    constraint = constraint_of(request)
    assert constraint is not None
    return compiler.compile(constraint)


def write(matcher: Matcher, text: str) -> bool:
    """Write bytes one by one; return False at the first that the matcher does not allow."""
    for byte in text.encode():
        allowed = matcher.allows(byte)
        assert bool(tokens_of(matcher.mask(), END + 1)[byte]) is allowed
        if not allowed:
            return False
        matcher.take(byte)
    return True


@pytest.mark.parametrize(
    ("request_", "right", "wrong"),
    [
        ({"guided_choice": ["Positive", "Negative", 'a/"b"\n']}, ["Positive", 'a/"b"\n'], ["Posit", "Maybe", ""]),
        ({"guided_regex": r"^\d{3}-[a-z]+$"}, ["123-ab"], ["123-", "x123-ab", "123-ab\n"]),
        ({"guided_regex": r"a/b\$"}, ["a/b$"], ["a/b"]),
        ({"guided_regex": "^foo|bar$"}, ["foo", "bar"], ["foobar"]),
        ({"guided_grammar": 'root ::= "yes" | "no" digit+\ndigit ::= [0-9]'}, ["yes", "no12"], ["no"]),
        ({"guided_grammar": '?start: NUM ("+" NUM)*\nNUM: /[0-9]+/\n%ignore " "'}, ["1 + 2"], ["1 +"]),
        ({"guided_json": CLOSED}, ['{"a":"x","b":1}'], ['{"a":"x"}', '{"a": "x","b":1}', '{"a":"x","b":1}x']),
        (
            {"guided_json": CLOSED, "guided_whitespace_pattern": "[ \\n]?"},
            ['{"a": "x",\n"b":1}'],
            ['{"a":  "x","b":1}'],
        ),
        ({"response_format": TAGS}, ["hi", 'so <f=add>{"a":"x","b":1}</f>.'], ["<f=sub>", '<f=add>{"a":"z"}</f>']),
    ],
)
def test_exactly_the_right_answers_can_be_written(
    compiler: Compiler, request_: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    ready = compiled(compiler, **request_)
    for text in [*right, *wrong]:
        matcher = ready.matcher()
        whole = write(matcher, text) and matcher.may_end
        assert whole is (text in right), text
        # Whitespace that is valid JSON is outside the compact grammar and inside the schema.
        if '": ' not in text and '":  ' not in text:
            assert check(ready, text).valid is whole, text


def test_json_schemas_inside_a_grammar_are_ours(compiler: Compiler) -> None:
    ready = compiled(compiler, guided_grammar='start: "<" %json {"properties": {"a": {"type": "null"}}} ">"')
    assert write(ready.matcher(), '<{"a":null}>')
    assert not write(ready.matcher(), '<{"\\u0061":1}>')


def test_an_answer_ends_only_where_it_is_whole_and_then_nothing_follows(compiler: Compiler) -> None:
    matcher = compiled(compiler, guided_choice=["a", "ab"]).matcher()
    assert not matcher.allows(END)
    assert write(matcher, "a")
    assert matcher.may_end
    assert not matcher.is_done
    assert matcher.allows(END)
    matcher.take(END)
    assert matcher.is_done
    assert list(np.flatnonzero(tokens_of(matcher.mask(), END + 1))) == [END]


def test_an_answer_that_can_only_end_is_done_without_an_end_token(compiler: Compiler) -> None:
    matcher = compiled(compiler, guided_choice=["ab"]).matcher()
    assert matcher.forced() == list(b"ab")
    assert write(matcher, "ab")
    assert matcher.is_done
    assert matcher.forced() == []
    matcher.take(END)
    assert matcher.is_done


def test_a_token_outside_the_mask_is_an_error_of_the_engine(compiler: Compiler) -> None:
    matcher = compiled(compiler, guided_choice=["ab"]).matcher()
    with pytest.raises((AssertionError, Refusal)):
        matcher.take(ord("x"))


def test_answers_of_one_grammar_do_not_disturb_each_other(compiler: Compiler) -> None:
    ready = compiled(compiler, guided_choice=["aa", "bb"])
    one, other = ready.matcher(), ready.matcher()
    assert write(one, "a")
    assert write(other, "b")
    assert not one.allows(ord("b"))
    assert not other.allows(ord("a"))


@pytest.mark.parametrize(
    ("text", "cut", "reason", "pointer"),
    [
        ('{"a":"x","b":1}', False, "", ""),
        ('{"a":"x","b":1}', True, "", ""),
        ('{"a":"x","b"', False, "not JSON", ""),
        ('{"a":"x","b"', True, "cut off by the limit of tokens: not JSON", ""),
        ('{"a":"x","b":"1"}', False, "'1' is not of type 'integer'", "/b"),
        ('{"a":"z","b":1}', False, "'z' is not one of ['x', 'y']", "/a"),
        ('{"a":"x","b":NaN}', False, "NaN", ""),
        ('{"a":"x","b":1,"c/d":2}', False, "'c/d' is no property", ""),
    ],
)
def test_the_last_check_says_what_is_wrong_and_where(
    compiler: Compiler, text: str, cut: bool, reason: str, pointer: str
) -> None:
    verdict = check(compiled(compiler, guided_json=CLOSED), text, cut=cut)
    assert verdict.valid is not bool(reason)
    assert reason in verdict.reason
    assert verdict.pointer == pointer
    assert verdict.cut is (cut and not verdict.valid)


def test_a_cut_choice_is_flagged(compiler: Compiler) -> None:
    verdict = check(compiled(compiler, guided_choice=["Positive"]), "Posi", cut=True)
    assert verdict.cut
    assert "none of the choices" in verdict.reason


def test_a_pattern_that_backtracks_for_ever_elsewhere_is_checked_at_once(compiler: Compiler) -> None:
    ready = compiled(compiler, guided_json={"type": "string", "pattern": "^(a+)+$"})
    assert not check(ready, '"' + "a" * 400 + 'b"').valid


def test_equal_constraints_are_compiled_once(compiler: Compiler) -> None:
    constraint = Constraint("choice", '["once"]', "guided_choice")
    assert compiler.submit(constraint) is compiler.submit(constraint)


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    compiler = Compiler(byte_tokenizer(), cache_size=2)
    a, b, c = (Constraint("choice", f'["{name}"]', "guided_choice") for name in "abc")
    first = compiler.submit(a)
    kept = compiler.submit(b)
    compiler.submit(c)
    assert compiler.submit(b) is kept
    assert compiler.submit(a) is not first
    compiler.close()


def test_a_grammar_that_takes_too_long_is_refused_and_tried_again_later() -> None:
    compiler = Compiler(byte_tokenizer(), time_limit_s=0.0)
    constraint = Constraint("json", '{"type":"object"}', "guided_json")
    first = compiler.submit(constraint)
    with pytest.raises(Refusal, match="took more than 0 s"):
        first.result(timeout=10)
    assert compiler.submit(constraint) is not first
    compiler.close()


@pytest.mark.parametrize(
    ("request_", "code", "part"),
    [
        ({"guided_regex": "a(?=b)"}, "guided.grammar", "look-around"),
        ({"guided_regex": "["}, "guided.grammar", "unclosed"),
        ({"guided_grammar": "start: foo"}, "guided.grammar", "foo"),
        ({"guided_grammar": "hello"}, "guided.grammar", "neither Lark nor EBNF"),
        ({"guided_grammar": "start: %json {"}, "guided.grammar", "%json"),
        ({"guided_json": {"allOf": [{"type": "null"}, {"type": "string"}]}}, "guided.unsatisfiable", "no JSON value"),
        ({"response_format": {"type": "structural_tag"}}, "guided.field", "structures"),
        ({"response_format": {**TAGS, "triggers": ["<g="]}}, "guided.field", "no trigger"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(
    compiler: Compiler, request_: dict[str, Any], code: str, part: str
) -> None:
    with pytest.raises(Refusal) as caught:
        compiled(compiler, **request_)
    assert caught.value.code == code
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_notes_of_the_schema_travel_with_the_grammar(compiler: Compiler) -> None:
    ready = compiled(
        compiler, guided_json={"type": "string", "format": "url", "x-y": 1}, guided_decoding_backend="auto"
    )
    assert "'auto'" in ready.notes[0]
    assert "is written as 'uri'" in ready.notes[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_model_s_own_tokens_write_only_valid_json(smollm2: Path, seed: int) -> None:
    random = Random(seed)
    tokenizer = tokenizer_of((smollm2 / "tokenizer.json").read_text(encoding="utf-8"), 49152, [0, 2])
    compiler = Compiler(tokenizer)
    ready = compiled(compiler, guided_json={**PAIR, "properties": {**PAIR["properties"], "c": {"maxLength": 20}}})  # type: ignore[dict-item]
    num_whole = 0
    for _ in range(10):
        matcher, tokens = ready.matcher(), list[int]()
        while not matcher.is_done and len(tokens) < 200:
            allowed = np.flatnonzero(tokens_of(matcher.mask(), 49152))
            if matcher.may_end:
                assert 0 in allowed
                break
            token = int(allowed[int(len(allowed) * random.random() ** 4)])
            assert matcher.allows(token)
            matcher.take(token)
            tokens.append(token)
        verdict = check(ready, tokenizer.decode_bytes(tokens).decode("utf-8", "replace"), cut=not matcher.may_end)
        assert verdict.valid or verdict.cut, verdict
        num_whole += verdict.valid
    assert num_whole > 0
    compiler.close()


def test_a_grammar_costs_less_than_a_tenth_of_a_second(compiler: Compiler) -> None:
    constraint = constraint_of({"guided_json": {**CLOSED, "title": "not yet in the cache"}})
    assert constraint is not None
    assert compiler.compile(constraint).seconds < 0.1
    assert len(building.build(constraint).lark) < 2000
