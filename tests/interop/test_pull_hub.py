"""`ferry pull` of a hub id, with the real huggingface_hub against a hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import ferry
from ferry.core.errors import InputError, IntegrityError, OutputError, UnavailableError
from ferry.core.manifest import read_manifest
from hub_server import Hub, serve

REPO = "someone/tiny-model"


def weights(seed: int, names: list[str], num_rows: int = 64) -> bytes:
    random = np.random.default_rng(seed)
    return save({name: random.standard_normal((num_rows, 256), np.float32) for name in names}, {"format": "pt"})


FILES = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": b"# tiny\n",
    "config.json": b'{"model_type": "llama"}\n',
    "model.safetensors": weights(0, ["a", "b", "c"], num_rows=8000),
    "onnx/model.onnx": b"the same weights again",
    "original/consolidated.00.pth": b"and again",
    "pytorch_model.bin": b"and again",
    "tokenizer.json": b'{"version": "1.0"}\n',
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub(REPO, dict(FILES))) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield running


def in_a_process(source: str, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ferry", "pull", source, "--output", str(output), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def cached() -> Path:
    return Path(os.environ["FERRY_HOME"]) / "cache" / "hub"


def test_a_model_comes_whole_and_weights_come_once(hub: Hub, tmp_path: Path) -> None:
    result = ferry.pull(source=REPO, output=tmp_path / "out")
    chosen = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*chosen, "ferry.json"])
    for name in chosen:
        assert (tmp_path / "out" / name).read_bytes() == FILES[name]
    assert sorted(asked.name for asked in hub.log) == chosen
    manifest = read_manifest(tmp_path / "out")
    assert manifest.details["source"] == {"kind": "hub", "name": REPO, "commit": hub.commit}
    assert set(manifest.tensors) == {"a", "b", "c"}
    assert manifest.files["model.safetensors"].covers == "envelope"
    assert result["model_sha256"] == manifest.model_sha256 != ""
    assert not list(cached().rglob("*.safetensors*")), "the cache is empty once the output is complete"


def test_the_plan_names_files_and_sizes_and_moves_nothing(hub: Hub, tmp_path: Path) -> None:
    from ferry.verbs.pull.config import PullConfig
    from ferry.verbs.pull.plan import plan

    config = PullConfig(source=REPO, output=tmp_path / "out")
    planned = plan(config)
    assert ("model.safetensors", len(FILES["model.safetensors"])) in planned.files
    assert hub.log == []
    assert list(tmp_path.iterdir()) == []
    ferry.pull(**dict(config))
    assert plan(config).identity == planned.identity, "a voyage recognises the step as done"


def test_a_second_pull_asks_one_question_and_moves_nothing(hub: Hub, tmp_path: Path) -> None:
    ferry.pull(source=REPO, output=tmp_path / "out")
    hub.log.clear()
    hub.num_api_calls = 0
    started = time.monotonic()
    result = ferry.pull(source=REPO, output=tmp_path / "out")
    assert result["already_there"]
    assert hub.log == []
    assert hub.num_api_calls == 1
    assert time.monotonic() - started < 1


def test_what_is_there_is_enough_when_the_hub_has_gone(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ferry.pull(source=REPO, output=tmp_path / "out")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert ferry.pull(source=REPO, output=tmp_path / "out")["already_there"]


def test_a_newer_commit_does_not_replace_what_is_there_unasked(hub: Hub, tmp_path: Path) -> None:
    ferry.pull(source=REPO, output=tmp_path / "out")
    hub.commit = "f00d" + "0" * 36
    hub.files["README.md"] = b"# newer\n"
    with pytest.raises(OutputError, match="exists already"):
        ferry.pull(source=REPO, output=tmp_path / "out")
    ferry.pull(source=REPO, output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_bytes() == b"# newer\n"


def test_a_file_that_was_lost_since_is_noticed(hub: Hub, tmp_path: Path) -> None:
    ferry.pull(source=REPO, output=tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is missing"):
        ferry.pull(source=REPO, output=tmp_path / "out")


def test_a_killed_pull_leaves_nothing_and_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    size, arrived = len(FILES["model.safetensors"]), 22_000_000
    hub.stall_after["model.safetensors"] = arrived
    process = in_a_process(REPO, tmp_path / "out")
    assert hub.stalled.wait(60)
    # The client hands on what arrives in pieces of 10 MiB.
    wait_for(lambda: any(path.stat().st_size >= 20 << 20 for path in cached().rglob(".partial-*")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    kept = next(cached().rglob(".partial-model.safetensors")).stat().st_size
    hub.log.clear()
    hub.go_on.set()
    again = in_a_process(REPO, tmp_path / "out")
    stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert [(asked.first, asked.sent) for asked in hub.log if asked.name == "model.safetensors"] == [
        (kept, size - kept)
    ]
    assert "config.json" not in [asked.name for asked in hub.log], "files that had arrived are not asked for again"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert any("resumes" in choice for choice in json.loads(stdout)["choices"])


def test_a_connection_that_breaks_once_is_mended_on_the_way(hub: Hub, tmp_path: Path) -> None:
    hub.break_after["model.safetensors"] = 15_000_000
    ferry.pull(source=REPO, output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    asked = [asked for asked in hub.log if asked.name == "model.safetensors"]
    assert asked[0].first == 0
    assert 0 < asked[1].first <= 15_000_000


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_with_one_flipped_bit_is_refused_and_not_kept(hub: Hub, tmp_path: Path, name: str) -> None:
    damaged = bytearray(FILES[name])
    damaged[-2] ^= 1
    hub.send_instead[name] = bytes(damaged)
    with pytest.raises(IntegrityError, match=f"{name} .* did not arrive as promised") as caught:
        ferry.pull(source=REPO, output=tmp_path / "out")
    assert caught.value.code == "pull.hash"
    assert not (tmp_path / "out").exists()
    assert not list(cached().rglob(f"*{name}"))
    hub.send_instead.clear()
    ferry.pull(source=REPO, output=tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == FILES[name]


def test_a_partial_file_of_other_bytes_is_found_by_hash(hub: Hub, tmp_path: Path) -> None:
    hub.break_after["model.safetensors"] = 0
    partial = cached() / REPO.replace("/", "--") / hub.commit / ".partial-model.safetensors"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    with pytest.raises(IntegrityError):
        ferry.pull(source=REPO, output=tmp_path / "out")
    ferry.pull(source=REPO, output=tmp_path / "out")


def test_sharded_weights_are_compared_with_their_index(hub: Hub, tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    del hub.files["model.safetensors"]
    hub.files |= {names[0]: weights(1, ["a"]), names[1]: weights(2, ["b"])}
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[0]}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(InputError, match="puts tensor b into"):
        ferry.pull(source=REPO, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    index["weight_map"]["b"] = names[1]
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.commit = "f00d" + "0" * 36
    assert ferry.pull(source=REPO, output=tmp_path / "out")["tensors"] == 2


def test_pickled_weights_are_taken_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    result = ferry.pull(source=REPO, output=tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == FILES["pytorch_model.bin"]
    assert result["model_sha256"] == ""
    assert "tensor hashes are left out" in result["choices"][0]
    assert read_manifest(tmp_path / "out").files["pytorch_model.bin"].covers == "file"


@pytest.mark.parametrize(
    ("source", "error", "code"),
    [
        ("someone/else", None, "hub.not-found"),
        (REPO, (404, "RevisionNotFound"), "hub.no-revision"),
        (REPO, (403, "GatedRepo"), "hub.gated"),
    ],
)
def test_what_the_hub_does_not_give_is_named(
    hub: Hub, tmp_path: Path, source: str, error: tuple[int, str] | None, code: str
) -> None:
    hub.error = error
    with pytest.raises(InputError) as caught:
        ferry.pull(source=source, output=tmp_path / "out")
    assert caught.value.code == code


def test_a_hub_in_trouble_is_unavailable(hub: Hub, tmp_path: Path) -> None:
    hub.error = (503, "")
    with pytest.raises(UnavailableError):
        ferry.pull(source=REPO, output=tmp_path / "out")


def test_the_built_in_name_takes_the_hub_where_there_is_one(hub: Hub, tmp_path: Path) -> None:
    hub.repo = "HuggingFaceTB/SmolLM2-135M-Instruct"
    result = ferry.pull(source="smollm2-135m-instruct", output=tmp_path / "out")
    assert result["choices"][0] == f"from the hub: it has {hub.repo}"
    assert read_manifest(tmp_path / "out").details["source"]["name"] == hub.repo
    hub.error = (503, "")
    assert ferry.pull(source="smollm2-135m-instruct", output=tmp_path / "out")["already_there"]


def test_file_names_that_lead_elsewhere_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["../evil.json"] = b"{}"
    with pytest.raises(InputError, match="outside its repository"):
        ferry.pull(source=REPO, output=tmp_path / "out")


def test_an_unreachable_hub_is_known_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    started = time.monotonic()
    process = in_a_process(REPO, tmp_path / "out")
    stdout, _ = process.communicate()
    assert process.returncode == 7
    assert json.loads(stdout)["error"]["code"] == "hub.unreachable"
    assert time.monotonic() - started < 15


def test_offline_takes_only_what_the_hubs_cache_holds(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    process = in_a_process(REPO, tmp_path / "out")
    stdout, _ = process.communicate()
    assert json.loads(stdout)["error"]["code"] == "hub.offline"
    fill = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r})"
    online = {**os.environ, "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", fill], env=online, check=True, capture_output=True)
    hub.error = (503, "")
    process = in_a_process(REPO, tmp_path / "out")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert read_manifest(tmp_path / "out").details["source"] == {"kind": "hub", "name": REPO, "commit": hub.commit}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
