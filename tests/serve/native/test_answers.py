"""Real models: the greedy answer is transformers' own, however many run beside it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import transformers

from ferry.engines.engine import EngineSettings
from ferry.engines.native.loop import NativeEngine
from native.reading import answers, ask
from native.tiny import peers_answer, write_model

COUNT = 12


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_transformers_at_1_8_and_32_streams(kind: str, tmp_path: Path) -> None:
    directory = write_model(kind, tmp_path / kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    random = Random(kind)
    prompts = [[random.randrange(211) for _ in range(random.randrange(1, 70))] for _ in range(32)]
    expected = {str(number): peers_answer(model, prompt, COUNT) for number, prompt in enumerate(prompts)}
    asked = [ask(str(number), prompt, max_tokens=COUNT) for number, prompt in enumerate(prompts)]
    settings = EngineSettings(directory, max_num_batched_tokens=48, prefix_caching=False, threads=1)
    engine = NativeEngine(settings)
    for streams in (1, 8, 32):
        made: dict[str, list[int]] = {}
        for start in range(0, 32, max(streams, 8)):
            made |= answers(engine, asked[start : start + streams])
        assert made == {name: expected[name] for name in made}
    engine.close()


@pytest.mark.slow
def test_smollm2_says_the_same_as_transformers_at_1_8_and_32_streams(smollm2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    topics = ("rain", "bread", "the moon", "a river", "trains", "old maps", "tea", "ships")
    openings = ("Write about {}:", "The history of {} begins", "Q: What is special about {}?\nA:", "{} and I")
    prompts = [tokenizer(opening.format(topic))["input_ids"] for topic in topics for opening in openings]
    expected = {str(number): peers_answer(model, prompt, 24) for number, prompt in enumerate(prompts)}
    engine = NativeEngine(EngineSettings(smollm2, max_model_len=512))
    for streams in (1, 8, 32):
        made: dict[str, list[int]] = {}
        for start in range(0, 32, streams):
            group = range(start, start + streams)
            made |= answers(
                engine, [ask(str(number), prompts[number], max_tokens=24, end_token_ids=(2,)) for number in group]
            )
        ended = {name: [*tokens, 2][:24] for name, tokens in made.items()}
        assert ended == {name: tokens[: len(ended[name])] for name, tokens in expected.items()}
    engine.close()
