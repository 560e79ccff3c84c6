"""Real models: the greedy answer is transformers' own, however many run beside it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import transformers

from ferry.engines.engine import EngineSettings
from ferry.engines.native.loop import NativeEngine
from native.reading import answers, ask
from native.tiny import likeliest_after, peers_answer, write_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_transformers_at_1_8_and_32_streams(kind: str, tmp_path: Path) -> None:
    directory = write_model(kind, tmp_path / kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    random = Random(kind)
    prompts = [[random.randrange(211) for _ in range(random.randrange(1, 70))] for _ in range(32)]
    asked = [ask(str(number), prompt, max_tokens=12) for number, prompt in enumerate(prompts)]
    engine = NativeEngine(EngineSettings(directory, max_num_batched_tokens=48, prefix_caching=False, threads=1))
    made = answers(engine, asked)
    assert answers(engine, asked[:8]) == {str(number): made[str(number)] for number in range(8)}
    assert answers(engine, asked[:1]) == {"0": made["0"]}
    engine.close()
    for name, tokens in made.items():
        assert likeliest_after(model, prompts[int(name)], tokens) == tokens
    assert [peers_answer(model, prompts[number], 12) for number in range(3)] == [made[name] for name in "012"]


@pytest.mark.slow
def test_smollm2_says_the_same_as_transformers_at_1_8_and_32_streams(smollm2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    topics = ("rain", "bread", "the moon", "a river", "trains", "old maps", "tea", "ships")
    openings = ("Write about {}:", "The history of {} begins", "Q: What is special about {}?\nA:", "{} and I")
    prompts = [tokenizer(opening.format(topic))["input_ids"] for topic in topics for opening in openings]
    asked = [ask(str(number), prompt, max_tokens=16) for number, prompt in enumerate(prompts)]
    engine = NativeEngine(EngineSettings(smollm2, max_model_len=512, prefix_caching=False))
    made = [answers(engine, asked)]
    for streams, count in ((8, 16), (1, 4)):
        made.append({})
        for start in range(0, count, streams):
            made[-1] |= answers(engine, asked[start : start + streams])
    engine.close()
    for name, tokens in made[0].items():
        assert likeliest_after(model, prompts[int(name)], tokens) == tokens
        assert all(others.get(name, tokens) == tokens for others in made)
