"""Which loss would this catch? The manual's two phases making another model than one run, or scales used where they
do not belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ferry.core.errors import ConfigError, FerryError, InputError
from quantize.making import change_weights, files_of, hidden_beside, quantized, write_text

ABOUT_OUTPUT = ("ferry.json", "quantization.json", "quantization.html")
"""What tells of the run; the rest is the model."""


def in_two_phases(source: Path, text: Path, top: Path, **options: Any) -> Path:
    """The manual's flow; scales are given in Ferry's own form in the second phase, which judges on the same text."""
    made = quantized(model=source, data=(str(text),), generate_scale=True, scale_output=top / "scales", **options)
    assert made["action"] == "scales"
    assert not hidden_beside(top / "scales")
    manual = {"quantize_model": True} if "per_token" in options else {}
    quantized(model=source, data=(str(text),), scale_input=top / "scales", output=top / "two", **manual, **options)
    return top / "two"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-bf16", {"per_token": True, "per_channel": True}),
        ("qwen2", {"per_token": False, "per_channel": False}),
        ("mixtral", {"per_token": True, "per_channel": True, "smooth_strength": 0.5}),
        ("llama", {"method": "awq"}),
        ("glm", {"per_token": True, "per_channel": True, "format": "ascend"}),
    ],
)
def test_two_phases_make_the_model_of_one_run(
    name: str, options: dict[str, Any], model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    quantized(model=model(name), data=(str(text),), output=tmp_path / "one", **options)
    in_two_phases(model(name), text, tmp_path, **options)
    assert files_of(tmp_path / "two", but=ABOUT_OUTPUT) == files_of(tmp_path / "one", but=ABOUT_OUTPUT)
    proofs = [json.loads((tmp_path / run / "quantization.json").read_text()) for run in ("one", "two")]
    assert proofs[0]["layers"] == proofs[1]["layers"]
    assert proofs[0]["whole"] == proofs[1]["whole"]
    assert proofs[0]["recipe_sha256"] == proofs[1]["recipe_sha256"]


@pytest.mark.parametrize(
    "options",
    [
        {"per_token": True, "per_channel": True},
        {"per_token": False, "per_channel": True},
        {"per_token": False, "per_channel": False},
    ],
)
def test_a_strength_beside_scales_that_were_searched_makes_the_model_of_that_strength(
    options: dict[str, Any], model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source, data = model("llama-bf16"), (str(text),)
    quantized(model=source, data=data, output=tmp_path / "one", smooth_strength=0.6, **options)
    quantized(model=source, data=data, generate_scale=True, scale_output=tmp_path / "scales", **options)
    quantized(
        model=source, data=data, quantize_model=True, scale_input=tmp_path / "scales", output=tmp_path / "two",
        smooth_strength=0.6, **options,
    )  # fmt: skip
    assert files_of(tmp_path / "two", but=ABOUT_OUTPUT) == files_of(tmp_path / "one", but=ABOUT_OUTPUT)
    proofs = [json.loads((tmp_path / run / "quantization.json").read_text()) for run in ("one", "two")]
    assert proofs[0]["whole"] == proofs[1]["whole"]
    checks = [[layer["self_check_nmse"] for layer in proof["layers"]] for proof in proofs]
    assert checks[0] == checks[1], "the factors that were checked are those that were applied"
    strengths = {linear["strength"] for layer in proofs[1]["layers"] for linear in layer["linears"]}
    assert strengths <= {0.6, None}


def test_one_run_keeps_its_scales_where_it_is_told(model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    source, data = model("llama"), (str(text),)
    quantized(model=source, data=data, output=tmp_path / "one", scale_output=tmp_path / "a.safetensors")
    quantized(model=source, data=data, generate_scale=True, per_token=True, per_channel=True,
              scale_output=tmp_path / "b.safetensors")  # fmt: skip
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
        assert about["text"] == text.name
        assert about["model"] == "llama"
        assert any(name.endswith("qkv.input_absmax") for name in file.keys())  # noqa: SIM118 - not a dictionary


# ---- refused


@pytest.fixture
def scales(model: Callable[[str], Path], text: Path, place: Path) -> Path:
    path = place / "scales-of-llama"
    if not path.exists():
        quantized(model=model("llama"), data=(str(text),), generate_scale=True, per_token=True, per_channel=True,
                  scale_output=path)  # fmt: skip
    return path


def refused(kind: type[FerryError], code: str, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(kind) as raised:
        quantized(output=tmp_path / "out", **options)
    assert raised.value.code == code
    assert raised.value.repair
    assert not (tmp_path / "out").exists()
    assert not hidden_beside(tmp_path / "out")
    return raised.value.message


@pytest.mark.parametrize(("layer", "what"), [(0, "mlp.down_proj.weight"), (1, "self_attn.q_proj.weight")])
def test_scales_of_a_model_with_other_weights_are_refused(
    layer: int, what: str, model: Callable[[str], Path], text: Path, tmp_path: Path, scales: Path
) -> None:
    """Also where only a later layer differs: nothing of the result is left then."""
    other = tmp_path / "other"
    shutil.copytree(model("llama"), other)
    change_weights(other, lambda tensors: tensors[f"model.layers.{layer}.{what}"][0, 0].add_(1))
    message = refused(
        InputError, "quantize.scale-mismatch", tmp_path, model=other, data=(str(text),), scale_input=scales
    )
    assert f"layer {layer} has other weights" in message


def test_scales_of_another_model_method_scheme_or_text_are_refused(
    model: Callable[[str], Path], text: Path, tmp_path: Path, scales: Path
) -> None:
    data = (str(text),)
    code = "quantize.scale-mismatch"
    given = {"model": model("llama"), "data": data, "scale_input": scales}
    assert "layers" in refused(InputError, code, tmp_path, **{**given, "model": model("llama-long")})
    assert "method" in refused(InputError, code, tmp_path, **given, method="awq")
    assert "scheme" in refused(InputError, code, tmp_path, **given, quantize_model=True)
    other = write_text(tmp_path / "other.jsonl", seed=4)
    assert "text" in refused(InputError, code, tmp_path, **{**given, "data": (str(other),)})


def test_a_damaged_or_foreign_file_of_scales_is_refused(
    model: Callable[[str], Path], text: Path, tmp_path: Path, scales: Path
) -> None:
    given = {"model": model("llama"), "data": (str(text),), "scale_input": tmp_path / "scales"}
    code = "quantize.scale-file"
    for size in (0, 4, 100, len(scales.read_bytes()) - 1):
        (tmp_path / "scales").write_bytes(scales.read_bytes()[:size])
        refused(InputError, code, tmp_path, **given)
    torch.save({"x": torch.ones(3)}, tmp_path / "scales")
    assert "torch.save" in refused(InputError, code, tmp_path, **given)
    shutil.copyfile(model("llama") / "model.safetensors", tmp_path / "scales")
    assert "no scales file" in refused(InputError, code, tmp_path, **given)
    (tmp_path / "scales").unlink()
    refused(InputError, code, tmp_path, **given)


def test_a_strength_for_a_method_without_one_is_refused(
    model: Callable[[str], Path], text: Path, tmp_path: Path, scales: Path
) -> None:
    given = {"model": model("llama"), "data": (str(text),), "scale_input": scales}
    refused(ConfigError, "quantize.unused", tmp_path, **given, method="awq", smooth_strength=0.5)


def test_scales_are_not_written_over_a_file_of_the_user(
    model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "scales").write_text("mine")
    with pytest.raises(FerryError, match="exists already") as raised:
        quantized(model=model("llama"), data=(str(text),), generate_scale=True, scale_output=tmp_path / "scales")
    assert raised.value.code == "output.exists"
    assert (tmp_path / "scales").read_text() == "mine"


@pytest.mark.parametrize("where", ["out/scales", "model/scales.safetensors"])
def test_scales_are_kept_beside_the_output_and_the_model(
    where: str, model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """An output that is not empty cannot become visible at the end; scales in a model would be taken for weights."""
    shutil.copytree(model("llama"), tmp_path / "model")
    before = files_of(tmp_path)
    message = refused(
        ConfigError, "quantize.scales", tmp_path, model=tmp_path / "model", data=(str(text),),
        scale_output=tmp_path / where,
    )  # fmt: skip
    assert "lies in" in message
    assert files_of(tmp_path) == before


def test_text_that_scales_were_made_from_is_not_held_out(
    model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """The second phase may name no text for calibration: then no digest tells what the first one saw."""
    source, scales = model("llama"), tmp_path / "scales"
    quantized(model=source, generate_scale=True, per_token=True, per_channel=True, samples=12, scale_output=scales)
    message = refused(InputError, "quantize.scale-mismatch", tmp_path, model=source, scale_input=scales, samples=11)
    assert "first 12 windows of 32 tokens" in message
    quantized(model=source, scale_input=scales, output=tmp_path / "one", samples=12)
    scales.unlink()
    quantized(model=source, data=(str(text),), generate_scale=True, per_token=True, per_channel=True,
              scale_output=scales)  # fmt: skip
    refused(InputError, "quantize.scale-mismatch", tmp_path, model=source, scale_input=scales, evaluation=text)


def test_the_error_without_factors_is_told_beside_the_least_one(
    model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    quantized(model=model("llama"), method="awq", data=(str(text),), generate_scale=True,
              scale_output=tmp_path / "scales")  # fmt: skip
    with safe_open(tmp_path / "scales", "pt") as file:
        layers = json.loads(file.metadata()["layers"])
    groups = [group for layer in layers for group in layer["groups"].values()]
    assert any(group["duo"] for group in groups)
    assert all(group["errors"][0] >= group["errors"][1] > 0 for group in groups)
