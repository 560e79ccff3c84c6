"""Which loss would this catch? An adapter that is read as something it is not, or merged into a model it is not for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ferry
from adapters import make_adapter
from ferry.core.errors import ConfigError, FerryError, InputError, IntegrityError, OutputError
from ferry.core.floats import from_float32, to_float32
from ferry.core.manifest import read_manifest
from ferry.core.progress import Reporter
from ferry.families.registry import model_of
from ferry.formats.opening import open_checkpoint
from ferry.formats.peft import open_adapter
from ferry.formats.peft_targets import short_targets, target_modules
from ferry.verbs.train.merge import Delta, merge, prepare
from models import Shelf, read_config, read_weights

QUIET = Reporter()


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def shelf_adapter(models: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny Qwen2 model. Read it, never write into it: take a copy."""
    return make_adapter(models("qwen2"), tmp_path_factory.mktemp("adapters") / "adapter", ["q_proj", "mlp"])


@pytest.fixture
def adapter(shelf_adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shelf_adapter, tmp_path / "adapter")


@pytest.fixture
def foreign(adapter: Path) -> Path:
    """The same adapter as another program would leave it: without a manifest."""
    (adapter / "ferry.json").unlink()
    return adapter


# Numbers


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_rounding_is_what_torch_does(name: str, dtype: torch.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    ties = np.arange(0, 2**32, 2**15, np.uint32)
    special = np.array([np.inf, -np.inf, np.nan, -0.0, 3.4e38, 65519.9, 65520.0], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    found = from_float32(values, name)
    expected = torch.from_numpy(values).to(dtype)
    found_values, expected_values = to_float32(found, name), expected.float().numpy()
    assert np.array_equal(found_values, expected_values, equal_nan=True)
    finite = ~np.isnan(values)
    assert np.array_equal(np.signbit(found_values[finite]), np.signbit(values[finite]))


@pytest.mark.parametrize("window_rows", [1, 7, 48])
def test_a_weight_is_changed_alike_whatever_the_height_of_the_windows(
    models: Shelf, adapter: Path, window_rows: int
) -> None:
    module = "model.layers.1.mlp.up_proj"
    opened = open_adapter(adapter)
    weight = read_weights(models("qwen2"))[f"{module}.weight"]
    rows = weight.view(torch.uint8).numpy()
    delta = Delta(opened, module)
    found = np.concatenate([delta(rows[row : row + window_rows], "BF16") for row in range(0, len(rows), window_rows)])
    a_RI, b_OR = opened.read(module)
    exact = weight.double().numpy() + 6 / 4 * (b_OR.astype(np.float64) @ a_RI.astype(np.float64))
    error = np.abs(to_float32(found, "BF16") - exact)
    # Half a unit in the last of bfloat16's 8 digits, and what float32 itself may lose.
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
    assert (error <= half_ulp + 1e-6).all()
    assert error.max() > 0, "nothing was rounded: this proves nothing"


# Reading


def test_an_adapter_is_read_as_it_was_written(models: Shelf, adapter: Path) -> None:
    opened = open_adapter(adapter)
    assert len(opened.modules) == 4 * 4
    assert opened.config.targets == ("q_proj", "gate_proj", "up_proj", "down_proj")
    assert opened.scale("model.layers.0.self_attn.q_proj") == 6 / 4
    assert opened.base_name == "qwen2"
    stored = load_file(adapter / "adapter_model.safetensors")
    for module in opened.modules:
        a_RI, b_OR = opened.read(module)
        assert np.array_equal(a_RI, stored[f"base_model.model.{module}.lora_A.weight"].numpy())
        assert np.array_equal(b_OR, stored[f"base_model.model.{module}.lora_B.weight"].numpy())
    manifest = read_manifest(adapter)
    base = ferry.verify(path=models("qwen2"))
    assert manifest.kind == "peft-adapter"
    assert manifest.details["base"]["model_sha256"] == base["model_sha256"]
    assert [node.id for node in manifest.lineage] == list(manifest.parents)


def test_torch_files_other_spellings_and_dtypes_are_read(foreign: Path) -> None:
    opened = open_adapter(foreign)
    before = {module: opened.read(module) for module in opened.modules}
    tensors = load_file(foreign / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): tensor.bfloat16() for name, tensor in tensors.items()}
    (foreign / "adapter_model.safetensors").unlink()
    torch.save(renamed, foreign / "adapter_model.bin")
    after = open_adapter(foreign)
    assert list(after.modules) == list(before)
    for module, factors in before.items():
        assert np.allclose(after.read(module).a_RI, factors.a_RI, rtol=2**-8, atol=0)
        assert np.allclose(after.read(module).b_OR, factors.b_OR, rtol=2**-8, atol=0)


def test_ranks_and_scales_follow_the_patterns(foreign: Path) -> None:
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {".*mlp.*": 10, "up_proj": 99}}
    change_json(foreign / "adapter_config.json", use_rslora=True, **patterns)
    tensors = load_file(foreign / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors[name.format("A")] = tensors[name.format("A")][:2].clone()
    tensors[name.format("B")] = tensors[name.format("B")][:, :2].clone()
    save_file(tensors, foreign / "adapter_model.safetensors")
    opened = open_adapter(foreign)
    assert opened.scale("model.layers.0.self_attn.q_proj") == 6 / 2**0.5
    assert opened.scale("model.layers.1.self_attn.q_proj") == 6 / 4**0.5
    assert opened.scale("model.layers.1.mlp.up_proj") == 10 / 4**0.5, "the first pattern that matches counts"


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"peft_type": "IA3"}, "lora.unsupported", "IA3"),
        ({"use_dora": True}, "lora.unsupported", "DoRA"),
        ({"bias": "lora_only"}, "lora.unsupported", "lora_only"),
        ({"fan_in_fan_out": True}, "lora.unsupported", "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "lora.unsupported", "modules_to_save"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "lora.unsupported", "experts"),
        ({"trainable_token_indices": [1]}, "lora.unsupported", "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "lora.unsupported", "layer_replication"),
        ({"lora_bias": True}, "lora.unsupported", "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "lora.unsupported", "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "lora.unsupported", "olora"),
        ({"some_new_idea": {"power": 2}}, "lora.unknown-key", "some_new_idea"),
        ({"r": 0}, "lora.config", "r is 0"),
        ({"r": None}, "lora.config", "r is None"),
        ({"r": 8}, "lora.rank", "rank 8"),
        ({"lora_alpha": "16"}, "lora.config", "lora_alpha"),
        ({"rank_pattern": {"q_proj": 2}}, "lora.rank", "q_proj"),
        ({"rank_pattern": {"(": 2}}, "lora.config", "regular expression"),
        ({"target_modules": None}, "lora.config", "target_modules"),
        ({"target_modules": ["q_proj"]}, "lora.targets", "leaves out"),
        ({"target_modules": r".*self_attn\.\w+"}, "lora.targets", "leaves out"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_config_that_means_something_else_is_refused_by_name(
    foreign: Path, fields: dict[str, Any], code: str, words: str
) -> None:
    change_json(foreign / "adapter_config.json", **fields)
    with pytest.raises(InputError) as caught:
        open_adapter(foreign)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_harmless_keys_are_kept_and_unknown_ones_that_are_off_too(foreign: Path) -> None:
    kept = {"revision": "main", "layers_to_transform": [0], "megatron_core": "megatron.core", "some_new_idea": None}
    change_json(foreign / "adapter_config.json", **kept, init_lora_weights="gaussian")
    assert kept.items() <= open_adapter(foreign).config.to_json().items()


def _without_one_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"]


def _with_magnitude(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.2.mlp.up_proj.lora_magnitude_vector"] = torch.ones(48)


def _with_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 131)


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B"
    tensors[f"{name}.default.weight"] = tensors[f"{name}.weight"].clone()


def _with_whole_module(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(131, 32)


@pytest.mark.parametrize(
    "change", [_without_one_b, _with_magnitude, _with_embedding, _twice, _with_whole_module, dict.clear]
)
def test_every_tensor_of_an_adapter_is_accounted_for(foreign: Path, change: Any) -> None:
    tensors = load_file(foreign / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, foreign / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        open_adapter(foreign)
    assert caught.value.code == "lora.tensors"


def test_a_directory_that_is_no_adapter_is_refused(models: Shelf, foreign: Path) -> None:
    with pytest.raises(InputError, match=r"it has no adapter_config.json"):
        open_adapter(models("qwen2"))
    (foreign / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapter(foreign)


# Targets


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("llama", ["all-linear"], "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("llama", ["attention"], "q_proj k_proj v_proj o_proj"),
        ("llama", ["down_proj", "q_proj"], "q_proj down_proj"),
        ("llama", ["linear_qkv", "linear_fc2"], "q_proj k_proj v_proj down_proj"),
        ("llama", ["linear_proj", "linear_fc1"], "o_proj gate_proj up_proj"),
        ("chatglm3", ["linear_qkv", "linear_fc1"], "query_key_value dense_h_to_4h"),
        ("qwen", ["mlp"], "w2 w1 mlp.c_proj"),
        ("qwen", ["attn.c_proj"], "attn.c_proj"),
        ("qwen3-moe", ["mlp"], "layers.1.mlp.gate_proj layers.1.mlp.up_proj layers.1.mlp.down_proj"),
        ("mixtral", ["all-linear"], "q_proj k_proj v_proj o_proj"),
        ("llama", ["model.layers.2.mlp.up_proj", "layers.3.mlp.up_proj"], "2.mlp.up_proj 3.mlp.up_proj"),
    ],
)
def test_words_for_targets_mean_modules_of_the_model(models: Shelf, name: str, words: list[str], expected: str) -> None:
    model = model_of(read_config(models(name)), name)
    modules = target_modules(model, words)
    ends = expected.split()
    assert modules
    assert all(f"{module}.weight" in model.canonical() for module in modules)
    assert {end for end in ends for module in modules if module.endswith(end)} == set(ends)
    assert all(module.endswith(tuple(ends)) for module in modules)
    short = short_targets(model, modules)
    everything = [tensor.removesuffix(".weight") for tensor in model.canonical()]
    assert [one for one in everything if any(one.endswith(f".{end}") or one == end for end in short)] == modules


@pytest.mark.parametrize(("name", "word"), [
    ("llama", "query_proj"), ("llama", "embed_tokens"), ("llama", "lm_head"), ("llama", "input_layernorm"),
    ("mixtral", "linear_fc1"), ("mixtral", "w1"), ("chatglm3", "q_proj"),
])  # fmt: skip
def test_a_target_that_cannot_carry_lora_is_refused_with_those_that_can(models: Shelf, name: str, word: str) -> None:
    model = model_of(read_config(models(name)), name)
    with pytest.raises(ConfigError) as caught:
        target_modules(model, ["attention", word])
    assert caught.value.code == "lora.target"
    assert "attention" in caught.value.repair
    assert all(module.rsplit(".", 1)[-1] in caught.value.repair for module in target_modules(model, ["all-linear"]))


# Merging


def test_a_merge_changes_the_targets_and_nothing_else(models: Shelf, adapter: Path, tmp_path: Path) -> None:
    base = models("qwen2")
    before = snapshot(base), snapshot(adapter)
    result = merge(base, adapter, tmp_path / "merged", QUIET)
    assert (snapshot(base), snapshot(adapter)) == before
    old, new = read_weights(base), read_weights(tmp_path / "merged")
    opened = open_adapter(adapter)
    assert list(old) == list(new)
    for name, tensor in old.items():
        is_target = name.removesuffix(".weight") in opened.modules
        assert torch.equal(tensor, new[name]) != is_target, name
    others = {name: data for name, data in before[0].items() if not name.endswith(".safetensors")}
    assert others.items() <= snapshot(tmp_path / "merged").items()
    assert result["merged_tensors"] == 16
    assert result["base_checked"]
    assert ferry.verify(path=tmp_path / "merged")["verified"]


def test_a_merged_model_names_both_parents_and_what_was_changed(models: Shelf, tmp_path: Path) -> None:
    base = tmp_path / "base"
    ferry.convert(source=models("llama"), target=tmp_path / "shards", tp=2)
    ferry.convert(source=tmp_path / "shards", target=base)
    made = make_adapter(base, tmp_path / "adapter")
    merge(base, made, tmp_path / "merged", QUIET)
    manifest = read_manifest(tmp_path / "merged")
    assert manifest.parents == (read_manifest(base).id, read_manifest(made).id)
    ids = [node.id for node in manifest.lineage]
    assert len(ids) == len(set(ids))
    assert {parent for node in manifest.lineage for parent in node.parents} <= set(ids)
    assert "28 weights" in manifest.changes[0]
    assert str(tmp_path) not in (tmp_path / "merged" / "ferry.json").read_text()


@pytest.mark.parametrize("name", ["llama-tied-stored-head", "llama-sharded", "qwen2-bin-sharded", "chatglm3"])
def test_shards_and_model_directories_merge_to_the_same_model(models: Shelf, tmp_path: Path, name: str) -> None:
    made = make_adapter(models(name), tmp_path / "adapter", ["linear_qkv", "linear_fc2"])
    ferry.convert(source=models(name), target=tmp_path / "shards", tp=2, pp=2)
    from_model = merge(models(name), made, tmp_path / "a", QUIET)
    from_shards = merge(tmp_path / "shards", made, tmp_path / "b", QUIET)
    assert from_model["model_sha256"] == from_shards["model_sha256"] != from_model["base_model_sha256"]
    assert from_model["base_model_sha256"] == from_shards["base_model_sha256"]


def test_a_wrong_base_is_refused_before_a_byte_is_written(models: Shelf, adapter: Path, tmp_path: Path) -> None:
    other = models.copy("qwen2", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="was trained on qwen2") as caught:
        merge(other, adapter, tmp_path / "merged", QUIET)
    assert caught.value.code == "lora.base"
    ferry.convert(source=other, target=tmp_path / "shards")
    with pytest.raises(IntegrityError, match="was trained on qwen2"):
        prepare(tmp_path / "shards", adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other", "shards"]


def test_an_adapter_without_a_record_is_accepted_with_a_note_if_it_fits(
    models: Shelf, foreign: Path, tmp_path: Path
) -> None:
    notes: list[str] = []

    class Listening(Reporter):
        def event(self, name: str, /, **fields: Any) -> None:
            notes.append(str(fields.get("text", "")))

    assert not merge(models("qwen2"), foreign, tmp_path / "merged", Listening())["base_checked"]
    assert any("does not say which model" in note for note in notes)
    with pytest.raises(InputError, match="have another shape") as caught:
        prepare(models("qwen2-tied"), make_foreign(models("qwen2"), tmp_path / "attention"))
    assert caught.value.code == "lora.fit"
    with pytest.raises(InputError, match="are not there"):
        prepare(models("chatglm3"), foreign)


def make_foreign(model: Path, target: Path) -> Path:
    (make_adapter(model, target) / "ferry.json").unlink()
    return target


def test_a_head_that_is_tied_cannot_be_merged_alone(models: Shelf, foreign: Path) -> None:
    tensors = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(131, 4)
    save_file(tensors, foreign / "adapter_model.safetensors")
    change_json(foreign / "adapter_config.json", target_modules=["lm_head"])
    prepare(models("qwen2"), foreign)
    with pytest.raises(InputError, match="lm_head"):
        prepare(models("qwen2-tied"), foreign)


def test_a_damaged_adapter_or_base_is_refused(models: Shelf, adapter: Path, tmp_path: Path) -> None:
    ferry.convert(source=models("qwen2"), target=tmp_path / "base")
    slot = open_checkpoint(tmp_path / "base").slots[4]
    flip_a_bit(slot.path, slot.offset)
    with pytest.raises(IntegrityError) as caught:
        merge(tmp_path / "base", adapter, tmp_path / "merged", QUIET)
    assert caught.value.code == "lora.base-damaged"
    flip_a_bit(adapter / "adapter_model.safetensors", -1)
    with pytest.raises(IntegrityError) as caught:
        merge(models("qwen2"), adapter, tmp_path / "merged", QUIET)
    assert caught.value.code == "lora.damaged"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def flip_a_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_diverged_adapter_is_refused(models: Shelf, foreign: Path, tmp_path: Path) -> None:
    tensors = load_file(foreign / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"][5, 1] = float("nan")
    save_file(tensors, foreign / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.up_proj .* not finite") as caught:
        merge(models("qwen2"), foreign, tmp_path / "merged", QUIET)
    assert caught.value.code == "lora.overflow"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_target_is_not_written_over_and_never_an_input(models: Shelf, adapter: Path, tmp_path: Path) -> None:
    base = models.copy("qwen2", tmp_path / "base")
    for target in (base, adapter, tmp_path):
        with pytest.raises(OutputError, match="is, or holds"):
            merge(base, adapter, target, QUIET, overwrite=True)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        merge(base, adapter, tmp_path / "merged", QUIET)
    merge(base, adapter, tmp_path / "merged", QUIET, overwrite=True)
    assert not (tmp_path / "merged" / "precious").exists()


class _Failing(Reporter):
    def advance(self, num_bytes: int) -> None:
        raise FerryError("stopped", code="test.stopped")


def test_an_error_leaves_nothing_half_made(models: Shelf, adapter: Path, tmp_path: Path) -> None:
    (adapter / "ferry.json").unlink()
    ferry.convert(source=models("qwen2"), target=tmp_path / "base")
    with pytest.raises(FerryError, match="stopped"):
        merge(tmp_path / "base", adapter, tmp_path / "new" / "merged", _Failing())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


KILLED_MERGE = """
import os, signal, sys
from pathlib import Path
from ferry.core.progress import Reporter
from ferry.verbs.train.merge import merge

class Killer(Reporter):
    def advance(self, num_bytes):
        os.kill(os.getpid(), signal.SIGKILL)

merge(*map(Path, sys.argv[1:]), Killer())
"""


def test_a_kill_leaves_nothing_half_made_and_the_next_merge_works(models: Shelf, adapter: Path, tmp_path: Path) -> None:
    ferry.convert(source=models("qwen2"), target=tmp_path / "base")
    words = [str(tmp_path / "base"), str(adapter), str(tmp_path / "merged")]
    done = subprocess.run([sys.executable, "-c", KILLED_MERGE, *words], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".merged.ferry-partial").exists(), "it was killed before or after the writing"
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "base", adapter, tmp_path / "merged", QUIET)
    assert ferry.verify(path=tmp_path / "merged")["verified"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_merging_needs_no_torch() -> None:
    code = "import sys; from ferry.verbs.train import merge; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
