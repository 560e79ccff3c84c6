"""Answers from Python: the manual's example, prompts in every form, many constraints at once, stops, seeds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import transformers

from ferry import LLM, GuidedDecodingParams, SamplingParams
from ferry.core.errors import UnavailableError
from ferry.sampling_params import StructuredOutputsParams
from quantize.making import write_model

MANUAL = """
from ferry import LLM, SamplingParams
from ferry.sampling_params import GuidedDecodingParams

MODEL_NAME = {model!r}
llm = LLM(model=MODEL_NAME)
guided_decoding_params = GuidedDecodingParams(choice=["Positive", "Negative"])
sampling_params = SamplingParams(guided_decoding=guided_decoding_params)
outputs = llm.generate(
    prompts="Classify this sentiment: vLLM is wonderful!",
    sampling_params=sampling_params,
)
print(outputs[0].outputs[0].text)
"""
"""The manual's example of offline inference; `vllm` is `ferry` in its import lines, and nothing else is changed."""
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SHORT = {"type": "string", "maxLength": 5}
SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["red", "green", 3, None]},
    {"const": {"a": [1, 2]}},
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 12},
    {"type": "integer", "minimum": 0, "maximum": 10**6, "multipleOf": 7},
    {"type": "string", "maxLength": 8},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"type": "array", "prefixItems": [SHORT, {"type": "null"}], "items": False, "minItems": 2},
    {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2},
    {"type": "object", "properties": {"name": SHORT}, "required": ["name"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": SHORT}, "additionalProperties": False},
    {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"], "additionalProperties": False,
     "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 10, "maximum": 20}]},
    {"oneOf": [{"const": "x"}, {"const": "y"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"not": {"type": ["object", "array", "string", "number"]}},
    {"type": "object", "properties": {"k": {"enum": ["a", "b"]}}, "required": ["k"], "additionalProperties": False,
     "if": {"properties": {"k": {"const": "a"}}}, "then": {"maxProperties": 1}},
    {"type": "string", "enum": ["überall", "日本", "\u00e9\u00e8"]},
    {"type": "array", "items": {"type": "array", "items": {"type": "null"}, "maxItems": 1}, "maxItems": 2},
    {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "boolean"}}, "additionalProperties": False,
     "maxProperties": 1},
    {"type": ["boolean", "null"]},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2},
]  # fmt: skip


def run_manual(model: Path, script: Path, capsys: pytest.CaptureFixture[str]) -> str:
    script.write_text(MANUAL.format(model=str(model)))
    runpy.run_path(str(script))["llm"].close()
    return capsys.readouterr().out.strip()


def test_the_manuals_example_answers_positive_or_negative(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_manual(tiny, tmp_path / "manual.py", capsys) in ("Positive", "Negative")


@pytest.mark.slow
def test_the_manuals_example_answers_positive_or_negative_on_a_real_model(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_manual(smollm2, tmp_path / "manual.py", capsys) in ("Positive", "Negative")


@pytest.mark.slow
def test_two_hundred_answers_of_a_real_model_keep_their_schema(smollm2: Path) -> None:
    schema = {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False,
    }  # fmt: skip
    params = SamplingParams(max_tokens=100, seed=1, guided_decoding=GuidedDecodingParams(json=schema))
    with LLM(smollm2) as llm:
        answers = llm.generate([f"Describe person {number}: " for number in range(200)], params)
    for answer in answers:
        (output,) = answer.outputs
        assert output.guided is not None
        assert output.guided.valid or output.finish_reason == "length"
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)


def test_24_schemas_at_once_are_all_kept(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=120, seed=number, structured_outputs=StructuredOutputsParams(json=schema))
        for number, schema in enumerate(SCHEMAS)
    ]
    answers = llm.generate(["Answer: "] * len(SCHEMAS), params)
    assert len(SCHEMAS) == len(answers) == 24
    for schema, answer in zip(SCHEMAS, answers, strict=True):
        (output,) = answer.outputs
        assert (output.finish_reason, output.guided and output.guided.valid) == ("stop", True), output
        jsonschema.validate(json.loads(output.text), schema)


def test_regex_and_grammar_and_json_object_are_kept_too(llm: LLM) -> None:
    constraints = [
        GuidedDecodingParams(regex="[0-9]{3}-[a-f]{2}"),
        GuidedDecodingParams(grammar='start: ("ab" | "c") "!"'),
        GuidedDecodingParams(json_object=True),
    ]
    params = [SamplingParams(max_tokens=40, seed=1, guided_decoding=one) for one in constraints]
    answers = llm.generate(["x", "y", "z"], params)
    for answer in answers:
        (output,) = answer.outputs
        assert output.guided is not None
        assert output.guided.valid or output.finish_reason == "length"
    assert answers[1].outputs[0].text in ("ab!", "c!")


def test_a_cut_guided_answer_says_that_it_is_invalid(llm: LLM) -> None:
    constraint = GuidedDecodingParams(json={"type": "string", "minLength": 20})
    (answer,) = llm.generate("x", SamplingParams(max_tokens=4, guided_decoding=constraint))
    (output,) = answer.outputs
    assert output.finish_reason == "length"
    assert output.guided is not None
    assert (output.guided.valid, output.guided.cut) == (False, True)


def test_prompts_come_as_text_as_tokens_and_as_mappings(llm: LLM) -> None:
    (plain,) = llm.generate("The sea", GREEDY)
    several = llm.generate(["The sea", {"prompt": "The sea"}, {"prompt_token_ids": plain.prompt_token_ids}], GREEDY)
    assert [answer.prompt for answer in several] == ["The sea", "The sea", None]
    for answer in several:
        assert answer.outputs[0].token_ids == plain.outputs[0].token_ids
        assert answer.prompt_token_ids == plain.prompt_token_ids
    assert plain.finished
    assert len(plain.outputs[0].token_ids) == 24


def test_what_is_asked_beside_a_prompt_does_not_change_its_answer(llm: LLM) -> None:
    prompts = [f"{'word ' * number}end" for number in range(8)]
    seeded = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)
    for params in (GREEDY, seeded):
        together = llm.generate(prompts, params)
        alone = [llm.generate(prompt, params)[0] for prompt in prompts]
        assert [one.outputs[0].token_ids for one in together] == [one.outputs[0].token_ids for one in alone]


def test_an_answer_ends_before_its_stop_text(llm: LLM) -> None:
    (whole,) = llm.generate("The sea", GREEDY)
    text = whole.outputs[0].text
    stop = text[8:11]
    cut = text[: text.index(stop)]
    (answer,) = llm.generate("The sea", GREEDY.model_copy(update={"stop": stop}))
    assert (answer.outputs[0].text, answer.outputs[0].finish_reason, answer.outputs[0].stop_reason) == (
        cut, "stop", stop,
    )  # fmt: skip
    assert len(answer.outputs[0].token_ids) < len(whole.outputs[0].token_ids)
    (kept,) = llm.generate("The sea", GREEDY.model_copy(update={"stop": [stop], "include_stop_str_in_output": True}))
    assert kept.outputs[0].text == cut + stop


def test_a_model_without_kernels_of_ours_answers_as_transformers_does(tmp_path: Path) -> None:
    fields = {"head_dim": 8, "attention_bias": True, "pad_token_id": 0}
    directory = write_model("Glm", tmp_path / "glm", **fields)
    prompts = ["The sea", "x" * 50, "Once upon a time"]
    with LLM(directory, threads=1, max_num_batched_tokens=16, block_size=8) as llm:
        assert any("transformers computes it" in note for note in llm.info.notes)
        answers = llm.generate(prompts, GREEDY)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    for answer in answers:
        ids = torch.tensor([answer.prompt_token_ids])
        alike = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=alike, max_new_tokens=24, do_sample=False, eos_token_id=-1)
        assert answer.outputs[0].token_ids == made[0, ids.shape[1] :].tolist()


def test_a_stop_token_ends_an_answer_and_is_named(llm: LLM) -> None:
    (whole,) = llm.generate("The sea", GREEDY)
    token = whole.outputs[0].token_ids[5]
    (answer,) = llm.generate("The sea", GREEDY.model_copy(update={"stop_token_ids": [token]}))
    first = whole.outputs[0].token_ids.index(token)
    assert answer.outputs[0].token_ids == whole.outputs[0].token_ids[:first]
    assert (answer.outputs[0].finish_reason, answer.outputs[0].stop_reason) == ("stop", token)


def test_n_answers_differ_and_are_those_of_their_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    (answer,) = llm.generate("The sea", params)
    texts = [output.token_ids for output in answer.outputs]
    assert [output.index for output in answer.outputs] == [0, 1, 2]
    assert len({tuple(ids) for ids in texts}) == 3
    assert [one.token_ids for one in llm.generate("The sea", params)[0].outputs] == texts
    single = [SamplingParams(seed=5 + index, max_tokens=8, ignore_eos=True) for index in range(3)]
    assert [one.outputs[0].token_ids for one in llm.generate(["The sea"] * 3, single)] == texts


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first, second = llm.generate(["The sea"] * 2, params)
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


def test_logprobs_are_of_the_tokens_and_of_the_likeliest(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    (answer,) = llm.generate("The sea", params)
    (output,) = answer.outputs
    assert output.logprobs is not None
    assert output.cumulative_logprob is not None
    assert answer.prompt_logprobs is not None
    chosen = [places[token].logprob for token, places in zip(output.token_ids, output.logprobs, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen))
    for token, places in zip(output.token_ids, output.logprobs, strict=True):
        assert places[token].rank == 1
        assert len(places) == 2
    assert answer.prompt_logprobs[0] is None
    assert [next(iter(places)) for places in answer.prompt_logprobs[1:] if places] == answer.prompt_token_ids[1:]


def test_all_logprobs_are_a_distribution(llm: LLM) -> None:
    (answer,) = llm.generate("The sea", SamplingParams(max_tokens=1, logprobs=-1, ignore_eos=True))
    assert answer.outputs[0].logprobs is not None
    values = [place.logprob for place in answer.outputs[0].logprobs[0].values()]
    assert len(values) == llm.info.num_tokens
    assert np.exp(values).sum() == pytest.approx(1, abs=1e-4)


def test_max_tokens_of_none_is_all_the_room_there_is(llm: LLM) -> None:
    (answer,) = llm.generate("x" * 500, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids) == llm.info.max_model_len == 512


def test_a_beginning_that_was_read_before_is_not_read_again(llm: LLM) -> None:
    prompt = "a beginning that several prompts have, " * 3
    llm.generate(prompt, GREEDY)
    (answer,) = llm.generate(prompt + "!", GREEDY)
    assert answer.num_cached_tokens >= 96


def test_what_is_closed_says_so(tiny: Path) -> None:
    llm = LLM(tiny, threads=1)
    llm.close()
    llm.close()
    assert llm.info.name == "native"
    with pytest.raises(UnavailableError, match="was closed"):
        llm.generate("x", GREEDY)


def test_conversations_go_through_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    one, other = llm.chat([messages, [*messages, *messages]], GREEDY)
    assert one.prompt == "<user>Hello<assistant>"
    assert other.prompt == "<user>Hello<user>Hello<assistant>"
    assert llm.chat(messages, GREEDY)[0].outputs[0].text == one.outputs[0].text


def test_parameters_are_importable_without_a_framework() -> None:
    code = (
        "import sys\nfrom ferry import SamplingParams, GuidedDecodingParams\nSamplingParams(n=2)\n"
        "assert not {'torch', 'transformers', 'llguidance'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
