"""Which loss would this catch? A layer that runs differently alone than inside the model of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from ferry.core.smoothing import linears
from ferry.formats.hf import open_hf
from quantize.making import KINDS, blocks_of, some_ids, weights_of
from vision_models import VOCAB as VISION_VOCAB
from vision_models import make_model as make_vision_model

FLOAT = [name for name, (_, fields) in KINDS.items() if "dtype" not in fields]
TOLERANCE = 1e-10
"""As NMSE of logits: float32 in another order gives 1e-13."""


def logits_by_blocks(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with blocks_of(directory) as blocks:
        h_BTH = blocks.embed(ids.numpy())
        for layer in range(blocks.model.dims.num_layers):
            h_BTH = blocks.run(blocks.load(layer), h_BTH)
        h_BTH = blocks.norm(h_BTH)
        return torch.cat([h_BTH @ rows.T for rows in blocks.head(100)], dim=-1)


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).square().sum() / wanted.square().sum()) < TOLERANCE


@pytest.mark.parametrize("name", FLOAT)
def test_layer_by_layer_gives_the_logits_of_the_whole_model(name: str, model: Callable[[str], Path]) -> None:
    ids = torch.from_numpy(some_ids())
    whole = transformers.AutoModelForCausalLM.from_pretrained(model(name), dtype=torch.float32)
    with torch.inference_mode():
        wanted = whole(ids.long()).logits
    check(logits_by_blocks(model(name), ids), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_of_a_vision_model_gives_its_logits_for_text(tied: bool, tmp_path: Path) -> None:
    directory = make_vision_model(tmp_path / "vl", tied=tied)
    ids = torch.from_numpy(some_ids(vocab=VISION_VOCAB - 7))
    whole = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        wanted = whole(input_ids=ids.long()).logits
    check(logits_by_blocks(directory, ids), wanted)


def test_a_sliding_window_matters_for_these_models(model: Callable[[str], Path]) -> None:
    """Else the tests above would not see a layer that looks too far back."""
    for name in ("mistral", "qwen2-sliding"):
        ids = torch.from_numpy(some_ids())
        with blocks_of(model(name)) as blocks:
            layer = blocks.load(blocks.model.dims.num_layers - 1)
            h_BTH = blocks.embed(ids.numpy())
            changed = h_BTH.clone()
            changed[:, 0] += 1
            same = blocks.run(layer, h_BTH)[:, 8:] == blocks.run(layer, changed)[:, 8:]
            assert bool(same.all()), name


@pytest.mark.parametrize("name", FLOAT)
def test_every_linear_of_a_layer_can_be_watched_by_its_name(name: str, model: Callable[[str], Path]) -> None:
    source = open_hf(model(name))
    with blocks_of(model(name)) as blocks:
        for number in range(blocks.model.dims.num_layers):
            layer = blocks.load(number)
            wanted = {linear.module: linear.cols for linear in linears(source.model, number)}
            assert set(layer.linears) == set(wanted)
            seen: dict[str, int] = {}

            def note(name: str, seen: dict[str, int] = seen) -> Callable[[torch.Tensor], None]:
                return lambda x: seen.update({name: x.shape[-1]})

            with layer.watched({name: note(name) for name in layer.linears}):
                blocks.run(layer, blocks.embed(some_ids(8)))
            assert seen == wanted
            experts = [linear.module for linear in linears(source.model, number) if linear.expert is not None]
            assert sorted(layer.experts) == sorted(experts)


def test_digests_are_those_of_the_stored_tensors(model: Callable[[str], Path]) -> None:
    with blocks_of(model("mixtral")) as blocks:
        blocks.load(1)
        found = dict(blocks.digests)
    assert len(found) == 19
    wanted = weights_of(model("mixtral"))
    for name, digest in found.items():
        assert digest == hashlib.sha256(wanted[name].numpy().tobytes()).hexdigest(), name
