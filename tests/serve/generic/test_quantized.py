"""Quantized checkpoints and rounding while loading: the arithmetic of 8-bit integers, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from ferry.core.errors import FerryError
from ferry.core.quantized import PER_ROW, Integers, Scheme, dequantize, quantize
from ferry.engines.engine import EngineSettings
from ferry.engines.native.generic import GenericExecutor, open_generic
from ferry.engines.native.linear8 import Linear8
from ferry.formats.quantized import LINEAR_ROLES, WEIGHT, open_quantized
from ferry.verbs.quantize.numerics import quantized_input
from generic.models import BLOCK, LIKE_LLAMA, VOCAB, steps_of, write_model
from models import Shelf
from quantized_models import SCHEMES, W4, W8A8, W8A8_STATIC, float_weights, write_quantized

W8A8_TENSOR = Scheme(8, PER_ROW, True, "tensor")


def opened(directory: Path, **settings: object) -> GenericExecutor:
    executor = open_generic(EngineSettings(directory, block_size=BLOCK, threads=1, **settings))  # type: ignore[arg-type]
    executor.allocate(4)
    return executor


def logits_of(executor: GenericExecutor, ids: np.ndarray) -> torch.Tensor:
    length = len(ids)
    steps = steps_of(
        [ids], [(2, 0, 3)], [((0, length - 4),), *(((place, place + 1),) for place in range(length - 4, length))]
    )
    return torch.cat([torch.from_numpy(executor.forward(batch)) for batch, _ in steps])


class Rounded(nn.Linear):
    """A linear of float weights that rounds its input as the scheme does: what integers compute, in floats."""

    def __init__(self, integers: Integers, bias: nn.Parameter | None) -> None:
        super().__init__(*reversed(integers.shape), bias=False)
        self.integers = integers
        self.weight = nn.Parameter(torch.from_numpy(dequantize(integers)))
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(quantized_input(x, self.integers.scheme, self.integers.input_scale))


def expected_logits(source: Path, integers: dict[str, Integers], ids: np.ndarray) -> torch.Tensor:
    """Return the logits of the float model after its linears were replaced by what their integers mean."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for path, found in integers.items():
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, Rounded(found, getattr(owner, leaf).bias))
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0]


def some_ids(vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(1).integers(3, vocab, 20)


@pytest.mark.parametrize("cols", [40, 1024, 1025, 3000])
def test_sums_of_products_are_exact_at_any_width(cols: int) -> None:
    random = np.random.default_rng(cols)
    values = random.integers(-127, 128, (6, cols)).astype(np.int8)
    values[0], values[1] = 127, -127
    linear = Linear8(Integers(W8A8, values, np.ones((6, 1), np.float32), "F32"), None)
    x = random.integers(-127, 128, (5, cols))
    x[:, 0] = 127  # so that the scale of each token is 1
    x[0], x[1] = 127, -127
    exact = (x.astype(np.int64) @ values.T.astype(np.int64)).astype(np.float32)
    assert np.array_equal(linear(torch.from_numpy(x.astype(np.float32))).numpy(), exact)


def test_a_token_of_zeros_gives_the_bias() -> None:
    integers = quantize(np.ones((3, 8), np.float32), W8A8, "F32")
    bias = torch.tensor([1.0, -2.0, 0.0])
    assert torch.equal(Linear8(integers, bias)(torch.zeros(2, 1, 8)), bias.expand(2, 1, 3))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", W8A8),
        ("llama", W8A8_STATIC),
        ("llama", W8A8_TENSOR),
        ("qwen2-tied", W8A8),
        ("llama-tied-stored-head", W8A8),
    ],
)
def test_a_w8a8_checkpoint_computes_what_its_integers_mean(
    name: str, scheme: Scheme, models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models(name), tmp_path / "quantized", "compressed-tensors", scheme)
    executor = opened(made.directory, dtype="float32")
    assert executor.scheme == "W8A8"
    expected = expected_logits(models(name), made.integers, some_ids())
    # A value at the edge between two integers may fall on either side of it after other sums.
    torch.testing.assert_close(logits_of(executor, some_ids()), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


def test_layers_that_stayed_float_are_float(models: Shelf, tmp_path: Path) -> None:
    floats = ("model.layers.1.mlp.down_proj",)
    made = write_quantized(models("llama"), tmp_path / "quantized", "compressed-tensors", W8A8, floats=floats)
    expected = expected_logits(models("llama"), made.integers, some_ids())
    found = logits_of(opened(made.directory, dtype="float32"), some_ids())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_of_a_w8a8_checkpoint_are_computed_one_by_one(name: str, models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models(name), tmp_path / "quantized", "compressed-tensors", W8A8)
    executor = opened(made.directory, dtype="float32")
    weights = float_weights(made.integers)
    experts = [module for module in executor.model.modules() if isinstance(module, Linear8)]
    assert len(experts) == len(weights)
    # Rounded activations differ from float ones by a per cent or so; a wrong expert by a hundred.
    found = logits_of(executor, some_ids())
    expected = logits_of(opened(models(name), dtype="float32"), some_ids())
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("form", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_four_bit_weights_become_floats_and_the_notes_say_so(
    name: str, form: str, models: Shelf, tmp_path: Path
) -> None:
    assert W4 in SCHEMES[form]
    made = write_quantized(models(name), tmp_path / "quantized", form, W4)
    executor = opened(made.directory, dtype="float32")
    assert any("W4A16 weights are computed as floats" in note for note in executor.notes)
    if name == "llama":
        held = dict(executor.model.named_parameters())
        for tensor, value in float_weights(made.integers).items():
            assert torch.equal(held[tensor], torch.from_numpy(value))
    assert torch.isfinite(logits_of(executor, some_ids())).all()


def test_rounding_while_loading_gives_the_integers_of_the_rule(models: Shelf) -> None:
    executor = opened(models("llama"), dtype="float32", quantization="w8a8")
    assert executor.scheme == "W8A8"
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    linears = {path for path, module in executor.model.named_modules() if isinstance(module, Linear8)}
    family = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert linears == family
    integers = {
        path: quantize(model.get_submodule(path).weight.detach().numpy(), W8A8, "F32") for path in sorted(linears)
    }
    for path, expected in integers.items():
        assert np.array_equal(executor.model.get_submodule(path).values_NK.numpy(), expected.values)
    expected_rows = expected_logits(models("llama"), integers, some_ids())
    found = logits_of(executor, some_ids())
    torch.testing.assert_close(found, expected_rows, rtol=1e-3, atol=1e-3 * expected_rows.abs().max())


def test_scales_and_rotary_frequencies_stay_float32_whatever_is_computed_in(models: Shelf) -> None:
    model = opened(models("llama"), dtype="bfloat16", quantization="w8a8").model
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {module.scales_N.dtype for module in model.modules() if isinstance(module, Linear8)} == {torch.float32}


def test_what_cannot_be_rounded_is_named(tmp_path: Path) -> None:
    fields = {**LIKE_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    executor = opened(write_model("Qwen3Moe", fields, tmp_path / "model"), quantization="w8a8")
    assert any("stay float, as model.layers.0.mlp.experts" in note for note in executor.notes), executor.notes


def test_a_quantization_that_is_none_of_ours_is_refused(models: Shelf) -> None:
    with pytest.raises(FerryError, match="--quantization gptq") as caught:
        opened(models("llama"), quantization="gptq")
    assert caught.value.code == "engine.quantization"


def test_the_roles_that_are_quantized_are_those_of_the_checkpoint(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("qwen2"), tmp_path / "quantized", "compressed-tensors", W8A8)
    checkpoint = open_quantized(made.directory)
    rounded = opened(models("qwen2"), quantization="w8a8").model
    paths = {path for path, module in rounded.named_modules() if isinstance(module, Linear8)}
    assert paths == set(checkpoint.schemes)
    assert {checkpoint.model.role_of(path + WEIGHT) for path in paths} <= set(LINEAR_ROLES)
