"""What the options of `ferry quantize` mean together: the manual's form, Ferry's own, and what contradicts itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ferry.core.config import Layer
from ferry.core.config import resolve as complete
from ferry.core.errors import ConfigError, FerryError, InputError, LayoutError
from ferry.core.quantized import PER_ROW, PER_TENSOR, Scheme
from ferry.core.resolution import understand
from ferry.verbs.quantize.config import QuantizeConfig
from ferry.verbs.quantize.job import Job, Limits
from ferry.verbs.quantize.manual import resolve
from ferry.verbs.quantize.verb import VERB

SIZES = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip


def config_in(directory: Path, **fields: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SIZES, **fields}))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Headers are not needed to decide: a config.json is."""
    return config_in(tmp_path / "model")


def job_of(model: Path, **fields: Any) -> Job:
    values = {"model": model, "output": model.parent / "out", **fields}
    return resolve(complete(QuantizeConfig, [Layer("argument", values)]).config)


def job_of_words(*words: object) -> Job:
    config = understand(VERB, [str(word) for word in words], {}).resolved.config
    assert isinstance(config, QuantizeConfig)
    return resolve(config)


def refused(kind: type[FerryError], code: str, model: Path, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        job_of(model, **fields)
    assert caught.value.code == code
    assert caught.value.repair
    return str(caught.value)


def test_a_model_and_an_output_are_enough_for_smoothquant_with_searched_strengths_and_a_proof(model: Path) -> None:
    job = job_of_words(model, "--output", model.parent / "out")
    assert (job.action, job.method, job.format) == ("quantize", "smoothquant", "compressed-tensors")
    assert job.scheme == Scheme(8, PER_ROW, True, "token")
    assert (job.calibrate, job.write, job.evaluate, job.strength) == (True, True, True, None)
    assert (job.scale_input, job.scale_output) == (None, None)
    assert job.limits == Limits(0.05, 0.88, 1.03)
    assert (job.text.num_windows, job.text.window_tokens, job.text.num_held_out) == (16, 512, 4)


def test_the_manuals_command_is_taken_word_for_word(model: Path) -> None:
    scales = model.parent / "scales" / "llama2-7b.pt"
    job = job_of_words(
        "--model-path", model, "--quantize-model", "--generate-scale", "--dataset-path", "val.jsonl",
        "--scale-output", scales, "--model-output", model.parent / "out", "--smooth-strength", "0.5",
        "--per-token", "--per-channel",
    )  # fmt: skip
    assert job.scheme == Scheme(8, PER_ROW, True, "token")
    assert (job.calibrate, job.write, job.strength, job.scale_output) == (True, True, 0.5, scales)
    assert job.text.data == ("val.jsonl",)
    assert any("safetensors" in choice for choice in job.choices)


def test_without_its_granularity_flags_the_manuals_form_has_one_scale_a_tensor(model: Path) -> None:
    both = job_of(model, quantize_model=True, generate_scale=True)
    assert both.scheme == Scheme(8, PER_TENSOR, True, "tensor")
    assert job_of(model, quantize_model=True, generate_scale=True, per_token=True).scheme == Scheme(
        8, PER_TENSOR, True, "token"
    )


def test_generate_scale_alone_makes_scales_and_no_model(model: Path) -> None:
    job = job_of_words("--model-path", model, "--generate-scale", "--scale-output", model.parent / "s.safetensors")
    assert (job.action, job.calibrate, job.write, job.evaluate, job.output) == ("scales", True, False, False, None)


def test_quantize_model_alone_reads_scales_and_does_not_calibrate(model: Path, tmp_path: Path) -> None:
    scales = tmp_path / "s.safetensors"
    scales.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    job = job_of(model, quantize_model=True, scale_input=scales, per_token=True, per_channel=True)
    assert (job.calibrate, job.write, job.scale_input) == (False, True, scales)
    assert job_of(model, scale_input=scales).calibrate is False


def test_scales_must_come_from_somewhere(model: Path) -> None:
    assert "--scale-input" in refused(ConfigError, "quantize.scales", model, quantize_model=True)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q"])
def test_scales_of_autosmoothquant_are_refused_with_what_to_do(model: Path, tmp_path: Path, start: bytes) -> None:
    scales = tmp_path / "llama2-7b.pt"
    scales.write_bytes(start)
    message = refused(InputError, "quantize.scale-file", model, quantize_model=True, scale_input=scales)
    assert "AutoSmoothQuant" in message
    assert "--generate-scale" in message


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("quantize.bits", {"method": "smoothquant", "bits": 4}),
        ("quantize.bits", {"method": "awq", "bits": 8}),
        ("quantize.unused", {"group_size": 128, "method": "smoothquant"}),
        ("quantize.unused", {"symmetric": False}),
        ("quantize.unused", {"method": "awq", "per_token": True}),
        ("quantize.unused", {"method": "awq", "smooth_strength": 0.5}),
        ("quantize.unused", {"dtype": "float16"}),
        ("quantize.unused", {"evaluate": False, "evaluation": "held-out.txt"}),
        ("quantize.unused", {"method": "rtn", "evaluate": False, "data": ("text.jsonl",)}),
        ("quantize.unused", {"generate_scale": True, "scale_output": "s", "evaluation": "held-out.txt"}),
        ("quantize.format", {"method": "awq", "format": "ascend"}),
        ("quantize.format", {"method": "smoothquant", "format": "awq"}),
        ("quantize.scales", {"method": "rtn", "scale_output": "s"}),
        ("quantize.scales", {"generate_scale": True, "quantize_model": True, "scale_input": "s"}),
        ("quantize.activations", {"method": "rtn", "per_token": False}),
        ("quantize.float", {"dequantize": True}),
        ("quantize.target", {"target": ("vllm-cp",)}),
    ],
)
def test_what_contradicts_itself_or_means_nothing_is_refused(model: Path, code: str, fields: dict[str, Any]) -> None:
    refused(ConfigError, code, model, **fields)


def test_an_unknown_engine_is_named_with_the_nearest_one(model: Path) -> None:
    assert "did you mean 'vllm-cpu'" in refused(ConfigError, "quantize.target", model, target=("vllm-cp",))


def test_four_bits_mean_awq_with_groups_and_zero_points(model: Path) -> None:
    job = job_of_words(model, "-o", model.parent / "out", "--bits", "4")
    assert (job.method, job.scheme, job.format) == ("awq", Scheme(4, 128, False, ""), "compressed-tensors")
    assert job.limits == Limits(0.35, 0.70, 1.30)
    assert job_of_words(model, "-o", "out", "--group-size=64").scheme == Scheme(4, 64, False, "")
    assert job_of(model, format="awq", symmetric=True).scheme == Scheme(4, 128, True, "")


def test_the_group_is_the_largest_that_divides_every_row_of_every_rank(tmp_path: Path) -> None:
    model = config_in(tmp_path / "smol", hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                      num_key_value_heads=3)  # fmt: skip
    job = job_of(model, method="awq")
    assert job.scheme == Scheme(4, 64, False, "")
    assert any("128 does not divide the 576" in choice for choice in job.choices)
    narrow = config_in(tmp_path / "narrow", intermediate_size=1024)
    assert job_of(narrow, method="awq", tp=8).scheme == Scheme(4, 64, False, "")


def test_no_group_for_a_model_of_odd_width_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = config_in(tmp_path / "odd", intermediate_size=1000)
    assert "1000" in refused(LayoutError, "quantize.group", model, method="awq")


def test_a_tensor_parallel_size_that_cannot_serve_the_model_is_refused(model: Path) -> None:
    assert "use 1, 2, 4, 8" in refused(LayoutError, "layout.tp", model, tp=3)


def test_rtn_needs_no_text_and_says_that_nothing_is_proven(model: Path) -> None:
    job = job_of(model, method="rtn")
    assert (job.calibrate, job.evaluate, job.needs_text, job.scheme) == (
        False, False, False, Scheme(8, PER_ROW, True, "token"),
    )  # fmt: skip
    assert any("nothing is proven" in choice for choice in job.choices)
    assert job_of(model, method="rtn", evaluation="held-out.txt").evaluate
    assert job_of(model, method="rtn", bits=4).scheme == Scheme(4, 128, False, "")


def test_a_limit_that_is_given_replaces_its_default_alone(model: Path) -> None:
    assert job_of(model, limits={"max_kl": 0.01}).limits == Limits(0.01, 0.88, 1.03)


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "ascend"),
        ({"quant_method": "awq", "bits": 4}, "compressed-tensors"),
    ],
)
def test_a_quantized_model_is_repacked_in_the_other_format(tmp_path: Path, held: dict[str, Any], wanted: str) -> None:
    model = config_in(tmp_path / "model", quantization_config=held)
    job = job_of(model)
    assert (job.action, job.format, job.scheme, job.needs_text) == ("repack", wanted, None, False)
    refused(ConfigError, "quantize.format", model, format=held["quant_method"])


def test_a_quantized_model_is_made_float_when_asked(tmp_path: Path) -> None:
    model = config_in(tmp_path / "model", quantization_config={"quant_method": "awq", "bits": 4})
    job = job_of(model, dequantize=True, dtype="float16")
    assert (job.action, job.format, job.dtype) == ("dequantize", "", "float16")


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    model = config_in(tmp_path / "model", quantization_config={"quant_method": "awq", "bits": 4})
    message = refused(ConfigError, "quantize.quantized", model, method="smoothquant", samples=4)
    assert "method, samples" in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"output": "o"}, "model is missing"), ({"model": "m"}, "output is missing"),
     ({"model": "m", "generate_scale": True}, "scale_output is missing")],
)  # fmt: skip
def test_a_missing_path_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        complete(QuantizeConfig, [Layer("argument", fields)])


def test_help_imports_neither_numpy_nor_a_framework() -> None:
    code = "import sys; from ferry.cli import main; main(['quantize', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--smooth-strength" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"numpy", "torch", "transformers"}
