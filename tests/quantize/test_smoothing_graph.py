"""Which loss would this catch? Factors that change the float model: a graph that does not describe its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ferry.core import family as f
from ferry.core.errors import IntegrityError
from ferry.core.progress import Reporter
from ferry.core.smoothing import Group, groups, linears
from ferry.data.windows import windows
from ferry.engines.blocks import Blocks, Layer
from ferry.families.registry import families
from ferry.formats.hf import open_hf
from ferry.verbs.quantize import factors
from ferry.verbs.quantize.journal import Journal
from ferry.verbs.quantize.manual import resolve
from ferry.verbs.quantize.passes import make_scales
from ferry.verbs.quantize.plan import prepare
from models import MODELS, Shelf
from quantize.making import KINDS, blocks_of, settings, some_ids
from vision_models import VOCAB as VISION_VOCAB
from vision_models import make_model as make_vision_model


def fold_random(blocks: Blocks, layer: Layer, edges: list[Group]) -> None:
    """Fold factors from 1/4 to 4 into a layer."""
    generator = torch.Generator().manual_seed(layer.index)
    for group in edges:
        drawn = torch.exp2(4 * torch.rand(group.num_factors, generator=generator) - 2)
        dtype = blocks.sources.dtype(group.source.name)
        factors.fold(layer, group, factors.settled(drawn, group, layer, dtype), dtype)


def change(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).double().square().sum() / wanted.double().square().sum())


def check_model(directory: Path, vocab: int) -> None:
    with blocks_of(directory) as blocks:
        h_BTH = blocks.embed(some_ids(vocab=vocab))
        for number in range(blocks.model.dims.num_layers):
            layer, smoothed = blocks.load(number), blocks.load(number)
            edges = groups(blocks.model, number)
            assert edges
            fold_random(blocks, smoothed, edges)
            moved = [
                name for name in layer.linears if change(smoothed.linears[name].weight, layer.linears[name].weight)
            ]
            assert moved == list(layer.linears), "every linear is behind some factors"
            wanted = blocks.run(layer, h_BTH)
            assert change(blocks.run(smoothed, h_BTH), wanted) < 1e-10, f"layer {number}"
            h_BTH = wanted


@pytest.mark.parametrize("name", KINDS)
def test_random_factors_leave_the_float_model_the_same(name: str, model: Callable[[str], Path]) -> None:
    check_model(model(name), 259)


def test_random_factors_leave_the_decoder_of_a_vision_model_the_same(tmp_path: Path) -> None:
    check_model(make_vision_model(tmp_path / "vl", dtype=torch.bfloat16), VISION_VOCAB - 7)


def test_a_norm_in_bfloat16_is_divided_exactly(model: Callable[[str], Path]) -> None:
    """What is stored, times the factors that were applied, is the norm as it was."""
    with blocks_of(model("llama-bf16")) as blocks:
        layer = blocks.load(0)
        group = groups(blocks.model, 0)[0]
        norm = layer.parameter(group.source.name).clone()
        given = torch.rand(group.num_factors) + 0.5
        settled = factors.settled(given, group, layer, "BF16")
        assert not torch.equal(settled, given)
        assert torch.allclose(settled, given, rtol=2**-7)
        factors.fold(layer, group, settled, "BF16")
        stored = layer.parameter(group.source.name)
        assert torch.equal(stored, stored.bfloat16().float())
        assert torch.allclose(stored * settled, norm, rtol=1e-6, atol=0)


def test_a_channel_whose_norm_is_0_or_would_become_0_keeps_its_factor_1(model: Callable[[str], Path]) -> None:
    with blocks_of(model("qwen2-f16")) as blocks:
        layer = blocks.load(0)
        group = groups(blocks.model, 0)[0]
        norm = layer.parameter(group.source.name)
        norm[0], norm[1] = 0.0, 6e-8
        settled = factors.settled(torch.full((group.num_factors,), 100.0), group, layer, "F16")
        assert settled[:2].tolist() == [1.0, 1.0]
        assert settled[2] != 1.0


def test_what_a_router_reads_is_divided_by_powers_of_two(model: Callable[[str], Path]) -> None:
    with blocks_of(model("qwen3-moe-bf16")) as blocks:
        layer = blocks.load(0)
        (group,) = [group for group in groups(blocks.model, 0) if group.feeds_router]
        settled = factors.settled(torch.rand(group.num_factors) + 0.3, group, layer, "BF16")
        assert set(settled.tolist()) <= {0.25, 0.5, 1.0, 2.0}
        router = blocks.model.part(f.ROUTER, 0).name
        factors.fold(layer, group, settled, "BF16")
        value = layer.parameter(router)
        assert torch.equal(value, value.bfloat16().float()), "it stays exact in its dtype"


@pytest.mark.parametrize("name", families())
def test_every_family_says_how_it_is_smoothed(name: str) -> None:
    assert families()[name].smoothing


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_behind_one_source_of_factors(name: str, models: Shelf) -> None:
    found = open_hf(models(name)).model
    for number in range(found.dims.num_layers):
        readers = [part for group in groups(found, number) for part in group.into if part.ndim == 2]
        assert {part.name for part in readers} >= {linear.name for linear in linears(found, number)}
        assert len({(part.name, part.row) for part in readers}) == len(readers), "none is multiplied twice"
        for group in groups(found, number):
            assert {part.cols for part in group.into} == {group.num_factors * group.repeats}


@pytest.mark.parametrize(
    ("name", "edge", "lacking"),
    [
        ("llama", "qkv", f.VALUE),
        ("llama", "gate_up", f.GATE),
        ("mixtral", "experts", f.ROUTER),
        ("glm", "gate_up", f.UP),
    ],
)
def test_a_graph_that_lacks_a_linear_is_caught_before_anything_is_quantized(
    name: str, edge: str, lacking: str, model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    job = resolve(settings(model=model(name), output=tmp_path / "out", data=(str(text),), smooth_strength=0.5))
    prepared = prepare(job)
    found = prepared.source.model
    wrong = tuple(
        item._replace(into=tuple(role for role in item.into if role != lacking)) if item.name == edge else item
        for item in found.family.smoothing
    )
    assert wrong != found.family.smoothing
    family = replace(found.family, smoothing=wrong)
    prepared = replace(prepared, source=replace(prepared.source, model=replace(found, family=family)))
    cut = windows(job.text, model(name), vocab_size=found.dims.vocab_size)
    with pytest.raises(IntegrityError, match="layer 0 is not the same after smoothing") as raised:
        make_scales(prepared, cut, Journal(tmp_path / "journal", "x"), Reporter())
    assert raised.value.code == "quantize.self-check"
    assert not (tmp_path / "out").exists()
