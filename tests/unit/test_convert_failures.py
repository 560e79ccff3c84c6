"""Which loss would this catch? A conversion that goes on where it must stop, that leaves half a result behind, or that
says nothing useful. Each mistake must be one clear error, exit with its own status, and lose nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ferry
from ferry.core.errors import ConfigError, FerryError, InputError, IntegrityError, LayoutError, OutputError
from ferry.formats.torch_zip import open_torch
from models import Shelf, change_config, read_weights


@pytest.fixture
def source(models: Shelf, tmp_path: Path) -> Path:
    """A copy of the small Llama that a test may damage."""
    return models.copy("llama", tmp_path / "source")


@pytest.fixture
def shards(models: Shelf, tmp_path: Path) -> Path:
    """The small tied Llama at TP2 PP2: replicas of norms, a tied copy and padding are all there."""
    ferry.convert(source=models("llama-tied"), target=tmp_path / "shards", tp=2, pp=2)
    return tmp_path / "shards"


def refused(top: Path, kind: type[FerryError], **options: Any) -> FerryError:
    """Convert, expect an error, and check that nothing at all was left behind."""
    before = tree(top)
    with pytest.raises(kind) as raised:
        ferry.convert(target=top / "out", **options)
    assert tree(top) == before
    assert "\n" not in str(raised.value)
    return raised.value


def tree(top: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file below a directory with its time and content, and every folder."""
    paths = sorted(top.rglob("*"))
    return {
        path.relative_to(top).as_posix(): (path.stat().st_mtime_ns if path.is_file() else 0, path.read_bytes())
        if path.is_file()
        else (0, b"")
        for path in paths
    }


# ---- layouts that cannot be


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("llama", {"tp": 3}, "use 1, 2 or 4"),
        ("llama", {"tp": 8}, "num_key_value_heads=4"),
        ("qwen3-moe", {"tp": 4}, "use 1 or 2"),
        ("llama", {"pp": 3}, "use a product of 1, 2, 4, --layer-list, or --noop-layers"),
        ("llama", {"pp": 2, "vpp": 4}, "use a product of 1, 2, 4"),
        ("llama", {"vpp": 2}, "vpp needs pp of 2 or more"),
        ("llama", {"pp": 2, "layers_per_virtual_stage": 3}, "does not fit 4 layers"),
        ("llama", {"ep": 2}, "a model without experts"),
        ("mixtral", {"ep": 3}, "use 1, 2 or 4"),
        ("llama", {"pp": 2, "layer_list": (1, 2)}, "expected pp=2 stages and 4 layers"),
        ("llama", {"pp": 2, "layer_list": (5, -1)}, "expected pp=2 stages and 4 layers"),
        ("llama", {"pp": 2, "vpp": 2, "layer_list": (2, 2)}, "cannot be combined"),
        ("llama", {"pp": 2, "noop_layers": (0, 9)}, "from 0 to 5"),
        ("llama", {"pp": 2, "noop_layers": (1, 1)}, "different numbers"),
        ("mixtral", {"names": "classic"}, "no place for experts"),
        ("qwen3", {"names": "classic"}, "no place for query and key norms"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_legal_values(
    models: Shelf, tmp_path: Path, name: str, options: dict[str, Any], says: str
) -> None:
    error = refused(tmp_path, LayoutError, source=models(name), **options)
    assert says in str(error)
    assert error.exit_status == 4


def test_the_family_is_checked_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    assert "is a llama model, --model-type says mixtral" in str(
        refused(tmp_path, InputError, source=source, model_type="mixtral")
    )
    assert "no family Ferry knows (did you mean" in str(
        refused(tmp_path, InputError, source=source, model_type="lamma")
    )


def test_a_config_of_an_unknown_family_is_refused(source: Path, tmp_path: Path) -> None:
    change_config(source, model_type="gpt_bigcode")
    assert "model_type 'gpt_bigcode'" in str(refused(tmp_path, InputError, source=source))


def test_a_config_that_lacks_a_size_is_refused_by_its_name(source: Path, tmp_path: Path) -> None:
    change_config(source, num_hidden_layers=None)
    assert "has no num_hidden_layers" in str(refused(tmp_path, InputError, source=source))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"direction": "mg2hf"}, ConfigError),
        ({"direction": "mg2mg"}, ConfigError),
        ({"direction": "hf2mg", "loader": "megatron"}, ConfigError),
        ({"direction": "hf2mg", "save_model_type": "huggingface"}, ConfigError),
        ({"direction": "hf2mg", "saver": "onnx"}, ConfigError),
        ({"direction": "sideways"}, ConfigError),
        ({"tensor_parallel": 2}, ConfigError),
        ({"tp": 0}, ConfigError),
        ({"iteration": "last"}, ConfigError),
    ],
)
def test_words_that_contradict_each_other_are_refused(
    source: Path, tmp_path: Path, options: dict[str, Any], kind: type[FerryError]
) -> None:
    assert refused(tmp_path, kind, source=source, **options).exit_status == 2


def test_a_parallel_size_for_a_hugging_face_result_is_refused(shards: Path, tmp_path: Path) -> None:
    assert "has no layout" in str(refused(tmp_path, LayoutError, direction="mg2hf", source=shards, tp=2))


def test_a_source_layout_that_does_not_match_is_refused(shards: Path, tmp_path: Path) -> None:
    error = refused(tmp_path, LayoutError, direction="mg2hf", source=shards, source_tp=4)
    assert "has tp=2, expected tp=4" in str(error)


# ---- sources that are not whole


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = read_weights(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    rewrite(source, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))  # type: ignore[arg-type, return-value]
    assert "1 missing: model.layers.2.mlp.up_proj.weight" in str(refused(tmp_path, InputError, source=source))


def test_an_unknown_tensor_is_named_and_never_dropped(source: Path, tmp_path: Path) -> None:
    rewrite(source, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    error = refused(tmp_path, InputError, source=source)
    assert "1 unknown: model.layers.0.self_attn.q_proj.bias" in str(error)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(source: Path, tmp_path: Path) -> None:
    rewrite(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert "model.norm.weight [31], expected [32]" in str(refused(tmp_path, InputError, source=source))


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_fused_tensor_of_two_dtypes_is_refused_and_never_cast(source: Path, tmp_path: Path, form: str) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].float()}))
    error = refused(tmp_path, InputError, source=source, tp=2, format=form)
    assert name in str(error)
    assert "F32" in str(error)


def test_layers_of_two_dtypes_cannot_be_stacked(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert refused(tmp_path, InputError, source=source, format="torch_dist").code == "torch-dist.mixed-dtype"


def test_a_tensor_of_its_own_dtype_travels_as_it_is(source: Path, tmp_path: Path) -> None:
    """Routers and norms of bf16 models are sometimes kept in float32."""
    rewrite(source, lambda tensors: tensors.update({"model.norm.weight": torch.randn(32)}))
    ferry.convert(source=source, target=tmp_path / "mg", tp=2, pp=2)
    ferry.convert(source=tmp_path / "mg", target=tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_cut_safetensors_are_refused(source: Path, tmp_path: Path, keep: int) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path, InputError, source=source).code.startswith("safetensors.")


def test_trailing_bytes_in_safetensors_are_refused(source: Path, tmp_path: Path) -> None:
    with open(source / "model.safetensors", "ab") as file:
        file.write(b"\0")
    assert refused(tmp_path, InputError, source=source).code == "safetensors.size"


def test_a_file_that_the_index_names_but_is_not_there_is_named(models: Shelf, tmp_path: Path) -> None:
    source = models.copy("llama-sharded", tmp_path / "source")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in str(refused(tmp_path, InputError, source=source))


def test_an_index_cannot_point_outside_its_directory(models: Shelf, tmp_path: Path) -> None:
    source = models.copy("llama-sharded", tmp_path / "source")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(next(source.glob("*.safetensors")), tmp_path / "elsewhere.safetensors")
    assert "../elsewhere.safetensors" in str(refused(tmp_path, InputError, source=source))


def test_a_source_that_is_not_there_or_not_a_model_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not there" in str(refused(tmp_path, InputError, source=tmp_path / "nowhere"))
    assert "neither a Hugging Face model" in str(refused(tmp_path, InputError, source=tmp_path / "empty"))


def one_shard(shards: Path) -> Path:
    return sorted(shards.rglob("model_optim_rng.pt"))[0]


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_a_cut_shard_is_refused(shards: Path, tmp_path: Path, part: float) -> None:
    path = one_shard(shards)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert refused(tmp_path, InputError, source=shards).code == "torch.container"


def test_a_rank_that_is_missing_is_noticed(shards: Path, tmp_path: Path) -> None:
    shutil.rmtree(one_shard(shards).parent)
    assert "expected TP2 x PP2" in str(refused(tmp_path, InputError, source=shards))


def test_a_tracker_that_names_nothing_is_refused(shards: Path, tmp_path: Path) -> None:
    (shards / "latest_checkpointed_iteration.txt").write_text("12")
    refused(tmp_path, InputError, source=shards)


def test_shards_of_another_model_than_their_config_are_refused(shards: Path, tmp_path: Path) -> None:
    config = json.loads((shards / "hf_assets/config.json").read_text())
    (shards / "hf_assets/config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    refused(tmp_path, FerryError, source=shards)


# ---- bytes that changed


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def place_of(path: Path, name: str, at: float = 0.5) -> int:
    """Return the offset of a byte inside a tensor of a shard."""
    archive = open_torch(path)
    extent = archive.extent(name, archive.structure["model"][name])
    return extent.offset + min(int(at * extent.num_bytes), extent.num_bytes - 1)


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        ("mp_rank_00_000", "decoder.layers.0.self_attention.linear_qkv.weight"),
        ("mp_rank_01_001", "decoder.layers.1.mlp.linear_fc2.weight"),
        ("mp_rank_01_000", "decoder.layers.0.input_layernorm.weight"),
        ("mp_rank_01_001", "output_layer.weight"),
        ("mp_rank_00_001", "output_layer.weight"),
    ],
)
@pytest.mark.parametrize("direction", ["mg2hf", "mg2mg"])
def test_a_flipped_bit_is_found_and_nothing_is_written(
    shards: Path, tmp_path: Path, rank: str, name: str, direction: str
) -> None:
    """A tensor, one copy of a norm, one copy of the tied embedding: none can change unseen."""
    path = shards / "release" / rank / "model_optim_rng.pt"
    flip(path, place_of(path, name, at=0.01))
    assert refused(tmp_path, IntegrityError, direction=direction, source=shards).exit_status == 5


def test_a_flipped_bit_in_padding_is_found_by_verify(shards: Path) -> None:
    """Padding is no part of the model: a conversion may pass over it, `verify` may not."""
    path = shards / "release/mp_rank_01_000/model_optim_rng.pt"
    flip(path, place_of(path, "embedding.word_embeddings.weight", at=1.0))
    with pytest.raises(IntegrityError, match="padding"):
        ferry.verify(path=shards)


def test_a_flipped_bit_in_a_foreign_shard_is_found_by_its_crc(shards: Path, tmp_path: Path) -> None:
    (shards / "ferry.json").unlink()
    path = one_shard(shards)
    flip(path, place_of(path, "decoder.layers.1.mlp.linear_fc1.weight"))
    assert refused(tmp_path, IntegrityError, source=shards).code == "torch.crc"


def test_assets_that_changed_since_the_manifest_are_named_and_declared(shards: Path, tmp_path: Path) -> None:
    """People edit chat templates: that is no damage, but it is never passed over in silence."""
    (shards / "hf_assets/tokenizer.json").write_text("{}")
    (shards / "hf_assets/new.txt").write_text("new")
    (shards / "hf_assets/vocab.txt").unlink()
    made = ferry.convert(source=shards, target=tmp_path / "out")
    declared = [
        "hf_assets/vocab.txt: removed since the source was made",
        "new.txt: added since the source was made",
        "tokenizer.json: changed since the source was made",
    ]
    assert made["changes"] == declared
    assert json.loads((tmp_path / "out/ferry.json").read_text())["changes"] == declared


def test_an_altered_manifest_is_refused(shards: Path, tmp_path: Path) -> None:
    text = (shards / "ferry.json").read_text()
    digest = json.loads(text)["tensors"]["model.norm.weight"]["sha256"]
    (shards / "ferry.json").write_text(text.replace(digest, "0" * 64))
    assert refused(tmp_path, IntegrityError, source=shards).code == "manifest.altered"


# ---- files that are not what they seem


class _Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['FERRY_TEST_MARK']}",)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FERRY_TEST_MARK", str(tmp_path / "code-was-run"))
    return tmp_path / "code-was-run"


def test_code_in_a_shard_is_not_run(shards: Path, tmp_path: Path, mark: Path) -> None:
    (shards / "ferry.json").unlink()
    path = one_shard(shards)
    torch.save({**torch.load(path, weights_only=False), "rng_state": _Shell()}, path)
    ferry.convert(source=shards, target=tmp_path / "hf")
    assert not mark.exists()


def test_code_in_a_torch_bin_is_not_run(models: Shelf, tmp_path: Path, mark: Path) -> None:
    source = models.copy("llama-bin", tmp_path / "source")
    tensors = torch.load(source / "pytorch_model.bin")
    torch.save({**tensors, "model.norm.weight": _Shell()}, source / "pytorch_model.bin")
    assert "expected a tensor" in str(refused(tmp_path, InputError, source=source))
    assert not mark.exists()


def repack(path: Path, *, compress: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """Write a torch file again with other members or another compression."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    content |= {next(name for name in content if name.endswith(f"/{member}")): data for member, data in members.items()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_torch_files_that_torch_itself_would_not_write_here_are_refused(models: Shelf, tmp_path: Path) -> None:
    source = models.copy("llama-bin", tmp_path / "source")
    path = source / "pytorch_model.bin"
    whole = path.read_bytes()
    repack(path, byteorder=b"big")
    assert refused(tmp_path, InputError, source=source).code == "torch.byteorder"
    path.write_bytes(whole)
    repack(path, compress=zipfile.ZIP_DEFLATED)
    assert refused(tmp_path, InputError, source=source).code == "torch.compressed"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    assert "format of before 1.6" in str(refused(tmp_path, InputError, source=source))
    path.write_bytes(pickle.dumps({"a": 1}))
    assert refused(tmp_path, InputError, source=source).code == "torch.container"


# ---- places that cannot be written


def test_an_existing_target_is_kept_unless_overwriting_is_asked_for(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("mine")
    assert refused(tmp_path, OutputError, source=source).code == "output.exists"
    ferry.convert(source=source, target=target, overwrite=True)
    assert not (target / "precious").exists()
    assert (target / "ferry.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failed_overwrite_keeps_the_old_target(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("mine")
    path = one_shard(shards)
    flip(path, place_of(path, "decoder.layers.1.mlp.linear_fc1.weight"))
    refused(tmp_path, IntegrityError, source=shards, overwrite=True)


def test_a_target_that_is_or_holds_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for target in (source, tmp_path, source / "."):
        with pytest.raises(OutputError) as raised:
            ferry.convert(source=source, target=target, overwrite=True)
        assert raised.value.code == "output.is-source"
    assert tree(tmp_path) == before


def test_overwriting_never_removes_the_original_model(models: Shelf, shards: Path, tmp_path: Path) -> None:
    """The manual's `--save-dir` is the original model: the result goes below it, also a second time."""
    original = models.copy("llama-tied", tmp_path / "original")
    before = tree(original)
    for _ in range(2):
        made = ferry.convert(direction="mg2hf", source=shards, target=original, overwrite=True)
        assert made["artifact"] == str(original / "mg2hf")
    shutil.rmtree(original / "mg2hf")
    assert tree(original) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small-disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small_is_noticed_before_writing(source: Path, small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"needs .*, .* has .* free") as raised:
        ferry.convert(source=source, target=small_disk / "out", tp=4, vocab_multiple=4096)
    assert raised.value.code == "output.disk-full"
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(source: Path, small_disk: Path) -> None:
    """Somebody else writes at the same time: what fitted at the start no longer does."""
    from ferry.core.progress import Reporter

    class Greedy(Reporter):
        carrying = False

        def start(self, label: str, total: int, unit: str = "bytes") -> None:
            self.carrying = label.startswith("carrying")

        def advance(self, num_bytes: int) -> None:
            if not self.carrying:
                return
            with open(small_disk / "other", "ab") as file:
                file.write(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))

    with pytest.raises(OutputError, match="filled up") as raised:
        ferry.convert(source=source, target=small_disk / "out", reporter=Greedy(), threads=1)
    assert raised.value.code == "output.disk-full"
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_read_only_place_is_refused(source: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="not writable") as raised:
        ferry.convert(source=source, target=small_disk / "out")
    assert raised.value.exit_status == 6


def test_a_limit_on_file_sizes_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    """The other way a write can fail half-way, which needs no root."""
    code = (
        "import resource, signal, sys; from ferry.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(source), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# ---- interrupted, and at the same time


@pytest.fixture
def long_way(models: Shelf, tmp_path: Path) -> Path:
    """A model that takes a moment to carry: the small Llama with a large vocabulary."""
    source = models.copy("llama", tmp_path / "long-way")
    change_config(source, vocab_size=700_000)
    large = {name: torch.randn(700_000, 32).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    rewrite(source, lambda tensors: tensors.update(large))
    return source


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ferry", "convert", str(source), str(target), "--tp", "2", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.001)


def test_a_killed_conversion_shows_nothing_and_the_next_one_works(long_way: Path, tmp_path: Path) -> None:
    target = tmp_path / "place/out"
    before = tree(long_way)
    partial = target.parent / ".out.ferry-partial"
    for moment in ("started", "carrying", "writing"):
        process = start(long_way, target)
        if moment != "started":
            wait_for(partial.exists, process)
        if moment == "writing":
            wait_for(lambda: any(path.stat().st_blocks > 4096 for path in partial.rglob("*.pt")), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{moment}: it was faster than this test"
        assert not target.exists()
    made = ferry.convert(source=long_way, target=target, tp=2)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert made["tensors"] == 39
    assert tree(long_way) == before


def test_a_terminated_conversion_cleans_up(long_way: Path, tmp_path: Path) -> None:
    target = tmp_path / "place/out"
    process = start(long_way, target)
    wait_for((target.parent / ".out.ferry-partial").exists, process)
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_of_two_converters_on_one_target_one_wins_and_one_is_told(long_way: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = start(long_way, target)
    wait_for((tmp_path / ".out.ferry-partial").exists, first)
    with pytest.raises(OutputError) as raised:
        ferry.convert(source=long_way, target=target)
    first.communicate()
    assert first.returncode == 0
    assert raised.value.code in ("output.busy", "output.exists")
    assert "TP2" in json.loads((target / "ferry.json").read_text())["summary"]


def test_many_converters_at_once_make_one_whole_result(models: Shelf, tmp_path: Path) -> None:
    outcomes: list[str] = []

    def convert() -> None:
        try:
            ferry.convert(source=models("llama"), target=tmp_path / "out", tp=2)
            outcomes.append("made")
        except OutputError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=convert) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("made") == 1
    assert set(outcomes) <= {"made", "output.busy", "output.exists"}
    assert ferry.convert(source=tmp_path / "out", target=tmp_path / "hf")["same_as_parent"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_sources_are_never_written_to(models: Shelf, tmp_path: Path) -> None:
    source = models.copy("qwen2-tied", tmp_path / "source")
    before = tree(source)
    ferry.convert(source=source, target=tmp_path / "mg", tp=2)
    after_first = tree(tmp_path / "mg")
    ferry.convert(direction="mg2mg", source=tmp_path / "mg", target=tmp_path / "mg2", pp=2)
    ferry.convert(source=tmp_path / "mg", target=tmp_path / "hf")
    assert tree(source) == before
    assert tree(tmp_path / "mg") == after_first


# ---- what lies in and around a model directory


def test_results_inside_the_model_directory_are_not_taken_for_its_assets(source: Path, tmp_path: Path) -> None:
    """The manual writes its result into a folder of the original model."""
    ferry.convert(source=source, target=source / "converted", tp=2)
    ferry.convert(source=source / "converted", target=source / "mg2hf")
    ferry.convert(source=source, target=tmp_path / "again")
    names = [path.relative_to(tmp_path / "again").parts for path in (tmp_path / "again").rglob("*")]
    assert not any({"converted", "mg2hf"} & set(parts) for parts in names)


def test_another_directory_s_tokenizer_does_not_bring_its_weight_index(models: Shelf, tmp_path: Path) -> None:
    ferry.convert(source=models("llama"), target=tmp_path / "mg", hf_assets=models("llama-sharded"))
    ferry.convert(source=tmp_path / "mg", target=tmp_path / "hf")
    assert not (tmp_path / "hf/model.safetensors.index.json").exists()
    ferry.convert(source=models("llama-sharded"), target=tmp_path / "mg2")
    ferry.convert(source=tmp_path / "mg2", target=tmp_path / "hf2", hf_assets=models("qwen"))
    index = "model.safetensors.index.json"
    assert (tmp_path / "hf2" / index).read_bytes() == (models("llama-sharded") / index).read_bytes()


def test_weights_that_changed_on_the_way_are_not_said_to_be_as_they_were(models: Shelf, tmp_path: Path) -> None:
    """Baichuan 2's head is normalised on the way to Megatron, and training changes everything."""
    from ferry.verbs.convert.report import report

    ferry.convert(source=models("baichuan2-7b"), target=tmp_path / "mg")
    back = ferry.convert(source=tmp_path / "mg", target=tmp_path / "hf")
    original = (models("baichuan2-7b") / "model.safetensors").read_bytes()
    assert (tmp_path / "hf/model.safetensors").read_bytes() != original
    assert "byte for byte" not in report(back)
