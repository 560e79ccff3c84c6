"""What is asked wrongly from Python is refused by name, before a token is made, and leaves nothing running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ferry import LLM, GuidedDecodingParams, SamplingParams
from ferry.core.errors import FerryError
from quantize.making import write_model
from quantized_models import W8A8, write_quantized

SHORT = SamplingParams(max_tokens=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 0}, "SamplingParams has no temprature (did you mean 'temperature'?)"),
        ({"guided_json": {}}, "SamplingParams has no guided_json"),
        ({"bad_words": ["x"]}, "bad_words is not done; use logit_bias"),
        ({"temperature": -1}, "temperature is -1: input should be greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 2}, "min_p is 2"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"n": 0}, "n is 0"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature 0"),
        ({"best_of": 3}, "best_of=3 is not n=1"),
        ({"min_tokens": 20}, "min_tokens=20 is more than max_tokens=16"),
        ({"stop": ""}, "an empty stop text"),
        ({"stop": ["a", ""]}, "an empty stop text"),
        ({"logprobs": -2}, "logprobs is -2"),
        ({"guided_decoding": {"choice": ["a"]}}, "guided_decoding"),
    ],
)
def test_parameters_that_are_wrong_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FerryError) as caught:
        SamplingParams(**values)
    assert message in str(caught.value)
    assert caught.value.code == "sampling.parameter"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "asks for nothing"),
        ({"choice": ["a"], "regex": "a"}, "an answer can follow only one"),
        ({"choice": []}, "must be a list of at least one text"),
        ({"json": "{"}, "is not JSON"),
        ({"chioce": ["a"]}, "GuidedDecodingParams has no chioce (did you mean 'choice'?)"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "which is not JSON"),
    ],
)
def test_constraints_that_are_wrong_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FerryError) as caught:
        GuidedDecodingParams(**values)
    assert message in str(caught.value)


def test_two_names_for_one_constraint_are_one_too_many() -> None:
    one = GuidedDecodingParams(choice=["a"])
    with pytest.raises(FerryError, match="two names of one thing"):
        SamplingParams(guided_decoding=one, structured_outputs=one)


def test_a_schema_that_cannot_be_kept_is_refused_before_a_token_is_made(llm: LLM) -> None:
    wrong = GuidedDecodingParams(json={"type": "array", "uniqueItems": True})
    before = llm._engine.stats()
    with pytest.raises(FerryError, match=r"prompt 1 of 2: 'uniqueItems'") as caught:
        llm.generate(["x", "y"], [SHORT, SamplingParams(guided_decoding=wrong)])
    assert caught.value.code == "guided.unsupported"
    assert llm._engine.stats() == before


def test_a_prompt_that_is_too_long_is_named_and_nothing_stays_behind(llm: LLM) -> None:
    with pytest.raises(FerryError, match="prompt 1 of 2: the prompt has 600 tokens") as caught:
        llm.generate(["short", "x" * 600], SHORT)
    assert caught.value.code == "engine.too-long"
    assert not llm._engine.has_work
    assert llm.generate("well again", SHORT)[0].finished


@pytest.mark.parametrize("prompt", [[7], [None], [{"text": "x"}]])
def test_what_is_no_prompt_is_refused(prompt: Any, llm: LLM) -> None:
    with pytest.raises(FerryError, match="expected a text"):
        llm.generate(prompt, SHORT)


def test_tokens_that_the_model_does_not_have_are_refused(llm: LLM) -> None:
    with pytest.raises(FerryError, match="none is 100000"):
        llm.generate({"prompt_token_ids": [1, 100000]}, SHORT)


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(FerryError, match="2 prompts have 1 sampling_params"):
        llm.generate(["a", "b"], [SHORT])


def test_no_prompts_have_no_answers(llm: LLM) -> None:
    assert llm.generate([], SHORT) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"max_model_length": 10}, "offline.option", "did you mean 'max_model_len'?"),
        ({"tensor_parallel_size": 2}, "offline.ranks", "tensor_parallel_size=2"),
        ({"quantization": "gptq"}, "offline.quantization", "'gptq' is unknown"),
        ({"quantization": "smoothquant"}, "offline.quantization", "`ferry quantize` makes quantized models"),
        ({"max_model_len": 4096}, "serve.max-model-len", "max_model_len=4096 is more than the model's 512 tokens"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    options: dict[str, Any], code: str, message: str, tiny: Path
) -> None:
    with pytest.raises(FerryError) as caught:
        LLM(tiny, **options)
    assert caught.value.code == code
    assert message in str(caught.value)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FerryError, match="is not there"):
        LLM(tmp_path / "nowhere")


def test_a_word_for_quantization_must_be_what_the_model_is(tiny: Path, tmp_path: Path) -> None:
    with LLM(tiny, quantization="w8a8", threads=1) as rounded:
        assert rounded.info.scheme == "W8A8"
    source = write_model("Llama", tmp_path / "float", torch.bfloat16)
    made = write_quantized(source, tmp_path / "quantized", "compressed-tensors", W8A8, manifest=False)
    with pytest.raises(FerryError, match="is LlamaForCausalLM, compressed-tensors W8A8") as caught:
        LLM(made.directory, quantization="awq")
    assert caught.value.code == "offline.quantization"
    for word in ("smoothquant", "compressed-tensors"):
        with LLM(made.directory, quantization=word, threads=1) as quantized:
            assert quantized.info.scheme == "W8A8"
            assert quantized.generate("x", SHORT)[0].finished
