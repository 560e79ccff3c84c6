"""A GGUF file that cannot be carried is refused before anything is written, and the message says what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from ferry.core.errors import InputError
from ferry.formats.gguf import gguf_plan, to_bfloat16
from ferry.formats.gguf_config import shortest
from gguf_files import finish, gguf_name, new_file, tiny_model, tiny_tokens, write_model, write_tokenizer


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_rounding_to_bfloat16_is_torchs(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    ours = torch.frombuffer(bytearray(to_bfloat16(values)), dtype=torch.bfloat16)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0).view(torch.int16), theirs.nan_to_num(0).view(torch.int16))


@given(st.integers(0, 2**16 - 1))
def test_what_was_bfloat16_comes_back_unchanged(bits: int) -> None:
    values = np.array([bits << 16], np.uint32).view(np.float32)
    quiet = bits | 0x40 if np.isnan(values[0]) else bits
    assert int.from_bytes(to_bfloat16(values), "little") == quiet


@pytest.mark.parametrize("written", [1e-5, 1e-6, 9.9e-7, 10000.0, 500000.0, 1000000.0, 0.1])
def test_a_float32_is_read_as_the_decimal_it_was_written_from(written: float) -> None:
    assert shortest(float(np.float32(written))) == written


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(path, tiny_model("llama"), "llama")
    return path


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(InputError, match="is not a GGUF file") as caught:
        gguf_plan(tmp_path / "model.gguf")
    assert caught.value.code == "gguf.magic"


@pytest.mark.parametrize("num_bytes", [0, 3, 4, 20, 100, 2_000, 20_000, -1_000_000, -1])
def test_a_file_that_is_cut_anywhere(good: Path, tmp_path: Path, num_bytes: int) -> None:
    path = Path(shutil.copy(good, tmp_path))
    os.truncate(path, num_bytes if num_bytes >= 0 else path.stat().st_size + num_bytes)
    with pytest.raises(InputError) as caught:
        gguf_plan(path)
    assert caught.value.code in ("gguf.magic", "gguf.header", "gguf.cut")


def test_a_big_endian_file(good: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(good, tmp_path))
    with open(path, "r+b") as file:
        file.seek(4)
        file.write((3).to_bytes(4, "big"))
    with pytest.raises(InputError, match="expected 2 or 3"):
        gguf_plan(path)


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    writer = new_file(tmp_path / "model.gguf", "mamba", tiny_model("llama").config)
    write_tokenizer(writer, tiny_tokens(512))
    writer.add_tensor("token_embd.weight", np.zeros((512, 256), np.float32))
    finish(writer)
    with pytest.raises(InputError, match="architecture 'mamba', expected one of llama, qwen2, qwen3"):
        gguf_plan(tmp_path / "model.gguf")


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def add(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blk.1.ffn_up.weight"), "lacks tensor blk.1.ffn_up.weight"),
        (drop("token_embd.weight"), "lacks tensor token_embd.weight"),
        (drop("output_norm.weight"), "lacks tensor output_norm.weight"),
        (add("blk.0.ffn_gate_inp.weight", (8, 256)), "has the unknown tensor blk.0.ffn_gate_inp.weight"),
        (add("blk.0.attn_q.bias", (256,)), "lacks tensor blk.0.attn_k.bias"),
        (add("blk.0.attn_q.weight", (128, 256)), r"q_proj.weight has shape \(128, 256\), its metadata says"),
        (add("rope_freqs.weight", (32,)), "belong to none of the known Llama 3 scalings"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = {gguf_name(name): tensor.float().numpy() for name, tensor in model.state_dict().items()}
    change(tensors)
    writer = new_file(tmp_path / "model.gguf", "llama", model.config)
    write_tokenizer(writer, tiny_tokens(512))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    with pytest.raises(InputError, match=message):
        gguf_plan(tmp_path / "model.gguf")


def test_a_type_that_cannot_be_computed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    writer: GGUFWriter = new_file(tmp_path / "model.gguf", "llama", model.config)
    write_tokenizer(writer, tiny_tokens(512))
    for name, tensor in model.state_dict().items():
        if name == "model.layers.0.mlp.up_proj.weight":
            raw = np.zeros((512, 256), np.int8)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.I8)
        else:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
    finish(writer)
    with pytest.raises(InputError, match="type I8, which the gguf package cannot dequantize"):
        gguf_plan(tmp_path / "model.gguf")


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    tokens = {**tiny_tokens(512), "model": "llama", "pre": "default"}
    write_model(tmp_path / "model.gguf", tiny_model("llama"), "llama", tokens=tokens)
    with pytest.raises(InputError, match=r"tokenizer 'llama' with pre-tokenizer 'default'.*--tokenizer DIR"):
        gguf_plan(tmp_path / "model.gguf")
