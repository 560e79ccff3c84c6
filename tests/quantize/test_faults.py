"""Which loss would this catch? Half an output, a message that names nothing, or work left behind for no use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ferry
from ferry.core.errors import ConfigError, FerryError, InputError, IntegrityError, OutputError
from quantize.making import VOCAB, change_weights, files_of, flags, hidden_beside, quantized, start, write_text

LIMIT_S = 300.0


def refused(kind: type[FerryError], code: str, output: Path, **options: Any) -> str:
    """Return the message of a run that ends in an error; nothing may be left of it."""
    before = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
    with pytest.raises(kind) as raised:
        quantized(output=output, **options)
    assert raised.value.code == code
    assert raised.value.repair
    assert "\n" not in raised.value.message
    assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else []) == before
    return raised.value.message


@pytest.fixture
def damaged(model: Callable[[str], Path], tmp_path: Path) -> Callable[[str, str, float], Path]:
    """A copy of a model with one value changed."""

    def get(name: str, tensor: str, value: float) -> Path:
        target = tmp_path / "damaged"
        shutil.copytree(model(name), target)
        change_weights(target, lambda tensors: tensors[tensor].reshape(-1)[3:4].fill_(value))
        return target

    return get


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    value: float, damaged: Callable[[str, str, float], Path], text: Path, tmp_path: Path
) -> None:
    source = damaged("llama", "model.layers.1.mlp.up_proj.weight", value)
    message = refused(InputError, "quantize.not-finite", tmp_path / "a" / "out", model=source, data=(str(text),))
    assert "model.layers.1.mlp" in message
    message = refused(InputError, "quantize.not-finite", tmp_path / "a" / "out", model=source, method="rtn")
    assert "model.layers.1.mlp.up_proj" in message


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
def test_activations_that_are_not_finite_name_the_first_linear_that_reads_them(
    tensor: str, damaged: Callable[[str, str, float], Path], text: Path, tmp_path: Path
) -> None:
    source = damaged("llama", tensor, float("nan"))
    if "embed" in tensor:
        change_weights(source, lambda tensors: tensors[tensor].fill_(float("nan")))
    message = refused(InputError, "quantize.not-finite", tmp_path / "out", model=source, data=(str(text),))
    assert "the input of model.layers.0.self_attn.q_proj" in message


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_last_weight_that_is_not_finite_never_becomes_a_result(
    tensor: str, damaged: Callable[[str, str, float], Path], text: Path, tmp_path: Path
) -> None:
    """No linear of a block reads what it spoils: the comparison of predictions must see it."""
    source = damaged("llama", tensor, float("nan"))
    with pytest.raises(FerryError) as raised:
        quantized(model=source, output=tmp_path / "out", data=(str(text),))
    assert raised.value.code == "quantize.not-finite"
    assert tensor.removesuffix(".weight") in raised.value.message or "layer 1" in raised.value.message
    assert not (tmp_path / "out").exists()
    assert not hidden_beside(tmp_path / "out")


def test_a_source_that_differs_from_its_manifest_is_refused(
    model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    ferry.convert(source=model("llama"), target=tmp_path / "megatron")
    ferry.convert(source=tmp_path / "megatron", target=tmp_path / "source")
    quantized(model=tmp_path / "source", output=tmp_path / "whole", method="rtn")
    for tensor in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        original = (tmp_path / "source" / "model.safetensors").read_bytes()
        change_weights(tmp_path / "source", lambda tensors, tensor=tensor: tensors[tensor][0, 0].add_(1))
        for options in ({"method": "rtn"}, {"data": (str(text),)}):
            message = refused(
                IntegrityError, "quantize.source-damaged", tmp_path / "out", model=tmp_path / "source", **options
            )
            assert tensor in message
        (tmp_path / "source" / "model.safetensors").write_bytes(original)


# ---- the place of the output


def test_an_output_that_exists_is_left_alone_unless_it_is_to_be_replaced(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    refused(OutputError, "output.exists", out, model=model("llama"), method="rtn")
    assert (out / "mine").exists()
    quantized(model=model("llama"), output=out, method="rtn", overwrite=True)
    assert not (out / "mine").exists()
    assert not hidden_beside(out)
    ferry.verify(path=out)


def test_the_source_is_never_replaced(model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("llama"), source)
    refused(OutputError, "output.is-source", source, model=source, method="rtn", overwrite=True)


def test_text_is_never_replaced(model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copyfile(text, out / "text.jsonl")
    given = str(out / "text.jsonl")
    for options in ({"data": (given,)}, {"data": (f"{given}:2", str(text))}, {"evaluation": given}):
        refused(OutputError, "output.is-source", out, model=model("llama"), overwrite=True, **options)
    refused(OutputError, "output.is-source", tmp_path / "new", model=model("llama"), data=(given,), overwrite=True,
            scale_output=given)  # fmt: skip
    assert (out / "text.jsonl").read_bytes() == text.read_bytes()


def test_a_budget_that_leaves_nothing_to_quantize_is_refused(
    model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    message = refused(
        ConfigError, "quantize.fallback", tmp_path / "out", model=model("llama"), data=(str(text),),
        search={"fallback_budget": 1.0},
    )  # fmt: skip
    assert "every linear would stay float" in message


def test_a_place_where_no_directory_can_be_made_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    """A link to itself stands for what may not be written: it stops root too."""
    (tmp_path / "loop").symlink_to("loop")
    refused(OutputError, "output.unwritable", tmp_path / "loop" / "out", model=model("llama"), method="rtn")


def test_a_file_in_the_way_of_the_output_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(OutputError, "output.unwritable", tmp_path / "file" / "out", model=model("llama"), method="rtn")


@pytest.mark.parametrize("limit", [pytest.param(20_000, marks=pytest.mark.slow), 60_000])
def test_where_a_disk_is_full_nothing_is_visible_and_the_same_command_goes_on(
    limit: int, model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for it, which needs no root: first in states, then in weights."""
    options = {"model": model("llama"), "data": (str(text),), "samples": 4}
    out = tmp_path / "out"
    program = (
        "import resource, signal, sys; from ferry.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    process = start(tmp_path / "log", *flags(**options, output=out), program=("-c", program))
    assert process.wait(LIMIT_S) == 6, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "output.disk-full" in said
    assert "run the same command again" in said
    assert not out.exists()
    quantized(**options, output=out)
    quantized(**options, output=tmp_path / "undisturbed")
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    assert not hidden_beside(out)


# ---- text


def test_text_of_which_nothing_is_left_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": ""}) + "\n" for _ in range(5)))
    with pytest.raises(InputError) as raised:
        quantized(model=model("llama"), output=tmp_path / "out", data=(str(rows),))
    assert raised.value.code.startswith("data.")
    assert "rows.jsonl" in raised.value.message
    assert not hidden_beside(tmp_path / "out")


def test_text_shorter_than_a_window_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "short"}) + "\n")
    message = refused(InputError, "data.too-short", tmp_path / "out", model=model("llama"), data=(str(rows),))
    assert "5 tokens" in message


def test_a_tokenizer_of_another_model_is_refused(model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:100].clone()

    change_weights(source, cut)
    message = refused(InputError, "data.vocabulary", tmp_path / "out", model=source, data=(str(text),))
    assert "the model has 0 to 99" in message
    assert VOCAB > 100


def test_the_real_command_says_what_is_wrong_with_text_that_its_own_process_reads(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "short"}) + "\n")
    words = flags(model=model("llama"), data=(str(rows),), output=tmp_path / "out")
    process = start(tmp_path / "log", *words)
    assert process.wait(LIMIT_S) == 3
    said = (tmp_path / "log").read_text()
    assert "[data.too-short]" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "rows.jsonl"]


def test_an_unknown_flag_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    process = start(tmp_path / "log", "model", "--smooth-strenght", "0.5")
    assert process.wait(LIMIT_S) == 2
    assert "--smooth-strength" in (tmp_path / "log").read_text()


def test_a_family_whose_code_travels_with_it_is_refused_where_text_would_run(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = models("chatglm3")
    rows = write_text(tmp_path / "rows.jsonl", 3)
    with pytest.raises(FerryError):
        quantized(model=source, output=tmp_path / "out", data=(str(rows),))
    assert not (tmp_path / "out").exists()
    assert not hidden_beside(tmp_path / "out")
