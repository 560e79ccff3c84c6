"""Which loss would these tests catch? A packed engine that computes another loss than the model's own code.

The judge is transformers: the same samples, one a row, padded, with its own attention, mask and loss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ferry.core.gather import Sources
from ferry.core.mesh import Mesh
from ferry.core.pipeline import pipeline
from ferry.formats.opening import open_checkpoint
from ferry.verbs.train.engine.batches import Packing, Sample, pack
from ferry.verbs.train.engine.context import MicroContext
from ferry.verbs.train.engine.groups import Groups
from ferry.verbs.train.engine.schedule import Runner
from ferry.verbs.train.engine.stage import Recipe, Stage, build_stage
from models import Shelf

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 5e-5
"""Relative, the gradient's to the largest of its tensor: some hundred roundings of 6e-8 in sums of other orders, more
where a gradient is a small difference of large terms (queries). Seen: 2e-7, and 1.1e-5 in the queries of glm."""
LENGTHS = (100, 17, 3, 41, 64, 2)
FAMILIES = ("llama", "qwen2", "qwen2-tied", "qwen3", "mistral", "glm", "mixtral", "qwen3-moe", "llama-llama3-rope")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def samples(vocab_size: int, seed: int = 3) -> list[Sample]:
    draw = np.random.default_rng(seed)
    start = np.zeros(1, np.int64)
    return [
        Sample(draw.integers(3, vocab_size, length).astype(np.int32), np.arange(length) >= length // 3, start)
        for length in LENGTHS
    ]


def engine(directory: Path) -> tuple[Stage, Callable[[list[Sample]], float]]:
    """Return the model as one stage, and what runs samples through it in packed rows: the loss, and gradients."""
    checkpoint = open_checkpoint(directory)
    dims = checkpoint.model.dims
    groups = Groups(Mesh(1, 1, 1, 1), 0, 0, 0, 0)
    (chunk,) = pipeline(dims.num_layers, 1, 1)
    recipe = Recipe(torch.float32, torch.device("cpu"))
    with Sources(checkpoint.slots) as sources:
        stage = build_stage(directory, checkpoint.model, chunk, groups, recipe, MicroContext(1), sources).stage
    runner = Runner([stage], groups, dims.hidden_size, torch.float32, torch.device("cpu"))
    packing = Packing(global_batch=len(LENGTHS), capacity=128, dp=1)

    def run(found: list[Sample]) -> float:
        batch = pack(found, packing, 0, 0, 0.0)
        assert len(batch.rows) < len(found), "samples share rows"
        return runner.run(batch.rows, 0, 1.0 / batch.num_supervised)

    return stage, run


def judge(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").train()


def padded(found: list[Sample]) -> dict[str, torch.Tensor]:
    longest = max(len(sample.tokens) for sample in found)
    ids = torch.zeros(len(found), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, sample in enumerate(found):
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(sample.supervised), tokens, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("name", FAMILIES)
def test_first_loss_and_gradients_are_those_of_transformers(models: Shelf, name: str) -> None:
    stage, run = engine(models(name))
    peer = judge(models(name))
    found = samples(peer.config.vocab_size)
    loss = peer(**padded(found)).loss
    loss.backward()
    assert run(found) == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    ours = {f"model.{key}": parameter.grad for key, parameter in stage.decoder.named_parameters()}
    assert stage.embedding is not None
    ours["model.embed_tokens.weight"] = stage.embedding.weight.grad
    if stage.head is not None:
        ours["lm_head.weight"] = stage.head.weight.grad
    theirs = {key: parameter.grad for key, parameter in peer.named_parameters()}
    assert set(ours) == set(theirs)
    for key, gradient in theirs.items():
        assert ours[key] is not None, key
        difference = (ours[key] - gradient).abs().max()
        assert difference <= GRADIENT_TOLERANCE * gradient.abs().max(), f"{key}: {difference} of {gradient.abs().max()}"


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral"])
def test_a_sample_does_not_see_its_neighbours_in_a_row(models: Shelf, name: str) -> None:
    _, run = engine(models(name))
    found = samples(131)
    silent = np.zeros(LENGTHS[3], np.bool_)
    before = run([*found[:3], found[3]._replace(supervised=silent), *found[4:]])
    other = found[3]._replace(tokens=found[3].tokens[::-1].copy(), supervised=silent)
    assert run([*found[:3], other, *found[4:]]) == before
    assert run([*found[:3], found[3]._replace(tokens=other.tokens), *found[4:]]) != run(found), "its own loss changes"
