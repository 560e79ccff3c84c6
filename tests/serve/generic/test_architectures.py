"""Logits of the paged executor against transformers' own forward: prompts in chunks beside decodes, in mixed blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ferry.core.errors import FerryError
from ferry.engines.engine import EngineSettings
from ferry.engines.native.executor import Batch
from ferry.engines.native.generic import GenericExecutor, open_generic
from generic.models import ARCHITECTURES, BLOCK, LIKE_LLAMA, VOCAB, expected_logits, steps_of, write_model

LENGTHS = (37, 21, 9)
TABLES = ((6, 2, 9, 0, 11), (1, 7, 3), (5, 10))
CUTS = (
    # A first chunk; a second one beside a whole prompt; decodes of unlike length; and all three at once.
    ((0, 13), (0, 0), (0, 0)),
    ((13, 33), (0, 20), (0, 0)),
    ((33, 34), (20, 21), (0, 5)),
    ((34, 35), (0, 0), (5, 6)),
    ((35, 36), (0, 0), (6, 7)),
    ((36, 37), (0, 0), (7, 9)),
)


def opened(directory: Path, **settings: object) -> GenericExecutor:
    executor = open_generic(EngineSettings(directory, block_size=BLOCK, threads=1, **settings))  # type: ignore[arg-type]
    executor.allocate(12)
    return executor


def some_sequences(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, VOCAB, length) for length in lengths]


def logits_of(executor: GenericExecutor, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    found = [torch.full((len(ids), VOCAB), torch.nan) for ids in sequences]
    for batch, read in steps_of(sequences, TABLES, CUTS):
        rows = torch.as_tensor(executor.forward(batch)).clone()
        for number, start, end in read:
            found[number][start:end], rows = rows[: end - start], rows[end - start :]
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunks_and_decodes_give_the_logits_of_whole_sequences(name: str, tmp_path: Path) -> None:
    kind, fields = ARCHITECTURES[name]
    directory = write_model(kind, fields, tmp_path / "model")
    sequences = some_sequences()
    found = logits_of(opened(directory, dtype="float32"), sequences)
    for logits, expected in zip(found, expected_logits(directory, sequences), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_a_number_in_one_sequence_stays_in_it(tmp_path: Path) -> None:
    directory = write_model("Llama", {**LIKE_LLAMA}, tmp_path / "model")
    executor = opened(directory, dtype="float32")
    sequences = some_sequences()
    expected = logits_of(executor, sequences)
    assert executor._cache is not None
    for kept in (*executor._cache.keys.values(), *executor._cache.values.values()):
        kept[:-1] = torch.nan  # what an earlier, broken request left in blocks that are given out again
    for logits, clean in zip(logits_of(executor, sequences), expected, strict=True):
        assert torch.equal(logits, clean)


def test_a_step_may_want_no_logits(tmp_path: Path) -> None:
    executor = opened(write_model("Llama", {**LIKE_LLAMA}, tmp_path / "model"))
    (batch, _), *_ = steps_of(some_sequences(), TABLES, CUTS)
    batch.logits_rows_R = np.zeros(0, np.int32)
    assert executor.forward(batch).shape == (0, VOCAB)


def test_bfloat16_is_computed_in_bfloat16_and_stored_in_half_the_memory(tmp_path: Path) -> None:
    directory = write_model("Llama", {**LIKE_LLAMA}, tmp_path / "model", torch.bfloat16)
    wide, narrow = (opened(directory, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert narrow.block_bytes * 2 == wide.block_bytes == 2 * 2 * BLOCK * 2 * 8 * 4
    assert narrow.weights_bytes < 0.6 * wide.weights_bytes
    for logits, expected in zip(*(logits_of(one, some_sequences()) for one in (narrow, wide)), strict=True):
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_float16_on_a_cpu_is_computed_in_float32_and_says_so(tmp_path: Path) -> None:
    executor = opened(write_model("Llama", {**LIKE_LLAMA}, tmp_path / "model"), dtype="float16")
    assert executor.dtype == "float32"
    assert any("float16 is asked for" in note for note in executor.notes)


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("Mamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}, "MambaForCausalLM keeps a state"),
        ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "does not let its attention"),
    ],
)
def test_models_that_are_no_keys_and_values_are_refused_by_name(
    kind: str, fields: dict[str, object], reason: str, tmp_path: Path
) -> None:
    directory = write_model(kind, fields, tmp_path / "model")
    with pytest.raises(FerryError, match=reason) as caught:
        opened(directory)
    assert caught.value.code == "engine.model"


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(d_model=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(FerryError, match="t5 is an encoder with a decoder"):
        opened(tmp_path)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    directory = write_model("Llama", {**LIKE_LLAMA}, tmp_path / "model")
    config = transformers.LlamaConfig(**(LIKE_LLAMA | {"num_hidden_layers": 3}))
    config.save_pretrained(directory)
    with pytest.raises(FerryError, match=r"lacks 9 weights of a llama model: model\.layers\.2") as caught:
        opened(directory)
    assert caught.value.code == "engine.weights"


def test_the_trial_reads_no_cache_and_the_cache_must_be_made_first(tmp_path: Path) -> None:
    executor = open_generic(EngineSettings(write_model("Llama", {**LIKE_LLAMA}, tmp_path / "model"), threads=1))
    empty = np.zeros(1, np.int32)
    with pytest.raises(AssertionError, match="allocate comes first"):
        executor.forward(Batch(empty, empty, empty, np.array([0, 1]), np.array([1]), empty[None], empty))
