"""Which loss would this catch? An adapter that PEFT and Ferry understand differently: PEFT judges both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapters import make_adapter
from ferry.core.progress import Reporter
from ferry.formats.peft import open_adapter
from ferry.verbs.train.merge import merge
from models import Shelf, read_weights

TOKENS = torch.arange(3, 3 + 24).reshape(2, 12)
LOGITS_TOLERANCE = 2e-5
"""Relative to the largest logit. float32 has 2**-24 = 6e-8 a rounding; W x + B (A x) and (W + B A) x differ by some
hundred roundings in sums of 48 terms over 4 layers. Seen: 3e-6. A wrong scale differs by 1."""


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def with_formula(model: Any, directory: Path) -> Any:
    """Add scale * B @ A, as Ferry reads them, to the weights of a model of transformers, in float64."""
    adapter = open_adapter(directory)
    for module in adapter.modules:
        a_RI, b_OR = (torch.from_numpy(matrix.copy()).double() for matrix in adapter.read(module))
        weight = model.get_submodule(module).weight
        weight.data = (weight.data.double() + adapter.scale(module) * b_OR @ a_RI).float()
    return model


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= LOGITS_TOLERANCE * expected.abs().max())


def randomise(model: Any) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize(("name", "words", "settings"), [
    ("llama", ["all-linear"], {}), ("qwen2", ["attention"], {"dropout": 0.1}),
    ("qwen2-tied", ["linear_qkv", "linear_fc2"], {"use_rslora": True}), ("glm", ["mlp"], {}),
])  # fmt: skip
def test_peft_loads_what_ferry_writes_and_computes_the_same(
    models: Shelf, tmp_path: Path, name: str, words: list[str], settings: dict[str, Any]
) -> None:
    directory = make_adapter(models(name), tmp_path / "adapter", words, **settings)
    loaded = PeftModel.from_pretrained(load(models(name)), str(directory)).eval()
    found = {key for key, _ in loaded.named_parameters() if ".lora_" in key}
    assert {key.replace(".default.", ".") for key in found} == set(read_weights(directory))
    expected = logits_of(with_formula(load(models(name)), directory))
    assert same(logits_of(loaded), expected)
    assert not same(logits_of(load(models(name))), expected), "an adapter that changes nothing proves nothing"


PEFT_CONFIGS = {
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"q_proj": 5, "^model.layers.1.mlp.down_proj": 11},
    },
    "rslora": {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "regex": {"target_modules": r".*\.layers\.[13]\..*_proj", "init_lora_weights": "gaussian"},
    "some-layers": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2], "exclude_modules": ["o_proj"]},
    "orthogonal": {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_ferry_reads_what_peft_writes_and_the_merged_model_computes_the_same(
    models: Shelf, tmp_path: Path, name: str, kind: str
) -> None:
    base = tmp_path / "base"
    load(models(name)).save_pretrained(base)
    model = get_peft_model(
        load(base), LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **PEFT_CONFIGS[kind])
    ).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model)
    assert same(logits_of(with_formula(load(base), tmp_path / "adapter")), expected)
    result = merge(base, tmp_path / "adapter", tmp_path / "merged", Reporter())
    assert not result["base_checked"]
    assert same(logits_of(load(tmp_path / "merged")), expected)
    assert not same(logits_of(load(base)), expected)


def test_a_bfloat16_merge_is_the_float32_merge_rounded_once(tmp_path: Path) -> None:
    """Weights of several windows, so that rows must be counted right across them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=384, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    directory = make_adapter(tmp_path / "base", tmp_path / "adapter", ["mlp"], rank=3)
    before = read_weights(tmp_path / "base")
    merge(tmp_path / "base", directory, tmp_path / "merged", Reporter())
    after, adapter = read_weights(tmp_path / "merged"), open_adapter(directory)
    windows = before["model.layers.0.mlp.up_proj.weight"].nbytes / (1 << 20)
    assert windows > 1
    for module in adapter.modules:
        a_RI, b_OR = (torch.from_numpy(matrix.copy()) for matrix in adapter.read(module))
        exact = before[f"{module}.weight"].float() + adapter.scale(module) * (b_OR @ a_RI)
        found = after[f"{module}.weight"].float()
        half_ulp = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 8)
        # Values whose float32 sum differs in its last bits may fall on the other side of a tie.
        assert ((found - exact).abs() <= half_ulp + 1e-6).all()


def test_peft_merges_to_the_same_float32_weights(models: Shelf, tmp_path: Path) -> None:
    base = tmp_path / "base"
    load(models("llama")).save_pretrained(base)
    directory = make_adapter(base, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load(base), str(directory)).merge_and_unload().state_dict()
    merge(base, directory, tmp_path / "merged", Reporter())
    ours = read_weights(tmp_path / "merged")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name


def test_ferry_keeps_what_peft_said_when_it_writes_a_config_again(models: Shelf, tmp_path: Path) -> None:
    model = get_peft_model(load(models("llama")), LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    again = open_adapter(tmp_path).config.to_json()
    assert {key: document[key] for key in again} == again
    assert all(not value for key, value in document.items() if key not in again)
