"""Optimizer state that Megatron trainers save is carried between layouts, or refused; never dropped, never mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ferry
from ferry.core.errors import LayoutError

WEIGHTS = "release/mp_rank_{}/model_optim_rng.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TP1 checkpoint with mixed-precision optimizer state, laid out as Megatron-LM saves it.

    Each state is a known function of its parameter, so that wherever it lands it can be recognised.
    """
    folder = tmp_path_factory.mktemp("trained")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=77, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "hf")
    ferry.convert(direction="hf2mg", source=folder / "hf", target=folder / "mg", vocab_multiple=1)
    (folder / "mg/ferry.json").unlink()
    path = folder / "mg" / WEIGHTS.format("00")
    add_optimizer(path)
    return folder / "mg"


def add_optimizer(path: Path) -> None:
    document = torch.load(path, weights_only=False)
    named = list(document["model"].items())
    groups = [[v for k, v in named if v.ndim > 1], [v for k, v in named if v.ndim == 1]]
    states, param_groups, masters = {}, [], []
    for decay, group in zip((0.1, 0.0), groups, strict=True):
        indices = range(len(states), len(states) + len(group))
        for index, value in zip(indices, group, strict=True):
            states[index] = {"step": torch.tensor(7.0), "exp_avg": value.float() * 2, "exp_avg_sq": value.float() ** 2}
        param_groups.append({"lr": 1e-4, "weight_decay": decay, "betas": (0.9, 0.95), "params": list(indices)})
        masters.append([value.float() * (1 + 2**-12) for value in group])
    document["optimizer"] = {
        "optimizer": {"state": states, "param_groups": param_groups},
        "fp32_from_fp16_params": masters,
    }
    document["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 640}
    document["args"].consumed_train_samples = 640
    torch.save(document, path)


def parameters_by_index(document: dict) -> dict[int, torch.Tensor]:
    """Number a rank's parameters as Megatron does: matrices first, vectors after, each in model order."""
    values = [v for key in sorted(k for k in document if k.startswith("model")) for v in document[key].values()]
    ordered = [v for v in values if v.ndim > 1] + [v for v in values if v.ndim == 1]
    return dict(enumerate(ordered))


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (1, 4, 1)])
def test_every_state_stays_with_its_parameter_in_any_layout(
    trained: Path, tmp_path: Path, tp: int, pp: int, vpp: int
) -> None:
    result = ferry.convert(direction="mg2mg", source=trained, target=tmp_path / "out", tp=tp, pp=pp, vpp=vpp)
    files = sorted((tmp_path / "out").glob("release/*/model_optim_rng.pt"))
    assert len(files) == tp * pp
    for file in files:
        document = torch.load(file, weights_only=False, mmap=True)
        parameters = parameters_by_index(document)
        state = document["optimizer"]["optimizer"]["state"]
        masters = [value for group in document["optimizer"]["fp32_from_fp16_params"] for value in group]
        assert set(state) == set(parameters)
        for index, value in parameters.items():
            assert torch.equal(state[index]["exp_avg"], value.float() * 2)
            assert torch.equal(state[index]["exp_avg_sq"], value.float() ** 2)
            assert torch.equal(masters[index].bfloat16(), value)
            assert state[index]["step"] == 7.0
        assert document["opt_param_scheduler"] == {"max_lr": 1e-4, "num_steps": 640}
        assert document["args"].consumed_train_samples == 640
    assert any("random states" in change for change in result["changes"])


def test_optimizer_state_there_and_back_is_bit_exact(trained: Path, tmp_path: Path) -> None:
    ferry.convert(direction="mg2mg", source=trained, target=tmp_path / "a", tp=2, pp=2)
    ferry.convert(direction="mg2mg", source=tmp_path / "a", target=tmp_path / "b")
    before = torch.load(trained / WEIGHTS.format("00"), weights_only=False)
    after = torch.load(tmp_path / "b" / WEIGHTS.format("00"), weights_only=False)
    for index, state in before["optimizer"]["optimizer"]["state"].items():
        for kind, value in state.items():
            assert torch.equal(after["optimizer"]["optimizer"]["state"][index][kind], value)
    assert after["optimizer"]["optimizer"]["param_groups"] == before["optimizer"]["optimizer"]["param_groups"]
    pairs = zip(after["optimizer"]["fp32_from_fp16_params"], before["optimizer"]["fp32_from_fp16_params"], strict=True)
    assert all(torch.equal(x, y) for new, old in pairs for x, y in zip(new, old, strict=True))


def edited(trained: Path, tmp_path: Path, change) -> Path:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    path = copy / WEIGHTS.format("00")
    document = torch.load(path, weights_only=False)
    change(document)
    torch.save(document, path)
    return copy


def test_a_master_that_belongs_to_another_parameter_is_refused(trained: Path, tmp_path: Path) -> None:
    def swap(document: dict) -> None:
        vectors = document["optimizer"]["fp32_from_fp16_params"][1]
        matrices = document["optimizer"]["fp32_from_fp16_params"][0]
        # Two layers' equal shapes: only the content can tell.
        same = [i for i, v in enumerate(matrices) if v.shape == matrices[1].shape]
        matrices[same[0]], matrices[same[1]] = matrices[same[1]], matrices[same[0]]
        assert vectors

    source = edited(trained, tmp_path, swap)
    with pytest.raises(LayoutError, match="does not round to its parameter"):
        ferry.convert(direction="mg2mg", source=source, target=tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_chained_optimizers_are_refused_and_can_be_left_behind_knowingly(trained: Path, tmp_path: Path) -> None:
    def chain(document: dict) -> None:
        document["optimizer"] = [document["optimizer"], document["optimizer"]]

    source = edited(trained, tmp_path, chain)
    with pytest.raises(LayoutError, match="--optimizer leave"):
        ferry.convert(direction="mg2mg", source=source, target=tmp_path / "out", tp=2)
    result = ferry.convert(direction="mg2mg", source=source, target=tmp_path / "out", tp=2, optimizer="leave")
    assert any("left behind as asked" in change for change in result["changes"])
    assert "optimizer" not in torch.load(tmp_path / "out" / WEIGHTS.format("00"), weights_only=False)


def test_the_way_to_hugging_face_says_that_the_optimizer_stays_behind(trained: Path, tmp_path: Path) -> None:
    result = ferry.convert(direction="mg2hf", source=trained, target=tmp_path / "hf")
    assert any("stay behind" in change for change in result["changes"])
