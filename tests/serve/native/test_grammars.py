"""Grammars in the loop: what comes out is in the language, ends are where it may end, nobody waits for a compiler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ferry.engines.request import Output
from native.reading import NUM_TOKENS, Reader, ask, engine_of, run, tokens_of

END = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a model whose tokens are bytes and three more, of which one ends a text."""
    directory = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    return directory


def write_byte_tokenizer(directory: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>", "<more>"])
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture
def engine(model: Path) -> Any:
    engine = engine_of(Reader(), num_blocks=200, model=model)
    yield engine
    engine.close()


def text_of(model: Path, outputs: list[Output]) -> str:
    return str(Tokenizer.from_file(str(model / "tokenizer.json")).decode(tokens_of(outputs)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_comes_out_is_in_the_language(engine: Any, model: Path, temperature: float) -> None:
    words = [f"w{number}-[a-f]{{3,9}}" for number in range(24)]
    for number, word in enumerate(words):
        grammar = f'start: "{{" BODY "}}"\nBODY: /{word}/\n'
        engine.add(ask(str(number), [number], grammar, max_tokens=40, temperature=temperature, end_token_ids=(END,)))
        engine.add(ask(f"free {number}", [number], max_tokens=5, temperature=temperature))
    made = run(engine)
    for number, word in enumerate(words):
        outputs = made[str(number)]
        assert re.fullmatch(rf"\{{{word}\}}", text_of(model, outputs))
        # A language without a way on ends by itself: no step is spent on the end token.
        assert (outputs[-1].finish, outputs[-1].end_token_id) == ("stop", None)
        assert len(tokens_of(made[f"free {number}"])) == 5


def test_an_end_token_is_taken_where_the_language_may_end_and_only_there(engine: Any, model: Path) -> None:
    end_first = {END: 100.0}
    grammar = "start: /(ab)+/"
    for name, sampling in {"soon": {}, "later": {"min_tokens": 5}, "no end": {"end_token_ids": ()}}.items():
        told = {"end_token_ids": (END,), "logit_bias": end_first, "max_tokens": 20, **sampling}
        engine.add(ask(name, [1], grammar, **told))
    made = run(engine)
    found = {name: (text_of(model, outputs), outputs[-1].finish) for name, outputs in made.items()}
    assert found == {"soon": ("ab", "stop"), "later": ("ababab", "stop"), "no end": ("ab" * 10, "length")}


def test_a_stop_token_that_is_text_does_not_cut_the_language(engine: Any, model: Path) -> None:
    letter = Tokenizer.from_file(str(model / "tokenizer.json")).encode("b").ids[0]
    engine.add(ask("a", [1], "start: /a[bc]{4}b?/", max_tokens=20, end_token_ids=(letter, END)))
    outputs = run(engine)["a"]
    assert re.fullmatch("ac{4}", text_of(model, outputs))
    assert outputs[-1].finish == "stop"


def test_where_only_a_stop_token_could_follow_the_answer_says_that_it_is_stuck(engine: Any, model: Path) -> None:
    letter = Tokenizer.from_file(str(model / "tokenizer.json")).encode("b").ids[0]
    engine.add(ask("a", [1], 'start: "ab"', max_tokens=20, end_token_ids=(letter, END)))
    last = run(engine)["a"][-1]
    assert (last.finish, last.error_code) == ("error", "guided.stuck")


def test_a_grammar_that_is_none_ends_its_request_alone(engine: Any) -> None:
    engine.add(ask("bad", [1], "start: nothing", max_tokens=5))
    engine.add(ask("good", [1], 'start: "yes" | "no"', max_tokens=5, end_token_ids=(END,)))
    made = run(engine)
    assert (made["bad"][-1].finish, made["bad"][-1].error_code) == ("error", "guided.grammar")
    assert made["good"][-1].finish == "stop"


def test_a_defect_of_what_compiles_ends_its_request_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("no JSON")
    engine = engine_of(Reader(), model=tmp_path)
    engine.add(ask("guided", [1], 'start: "yes"', max_tokens=5))
    engine.add(ask("free", [1], max_tokens=5))
    made = run(engine)
    engine.close()
    assert (made["guided"][-1].finish, made["guided"][-1].error_code) == ("error", "guided.grammar")
    assert made["free"][-1].finish == "length"


def test_a_request_can_be_cancelled_while_its_grammar_is_compiled(engine: Any) -> None:
    engine.add(ask("a", [1], 'start: "yes" | "no"', max_tokens=5))
    assert engine.stats().num_waiting == 1
    assert engine.cancel("a")
    assert not engine.has_work
    assert not engine.cancel("a")


def test_preempted_answers_keep_their_place_in_the_grammar(model: Path) -> None:
    engine = engine_of(Reader(), num_blocks=8, model=model, prefix_caching=False)
    for number in range(4):
        engine.add(ask(str(number), [number] * 8, "start: /(xyz){10}/", max_tokens=40))
    made = run(engine)
    assert {text_of(model, outputs) for outputs in made.values()} == {"xyz" * 10}
    assert engine.stats().num_preemptions > 0
    engine.close()
