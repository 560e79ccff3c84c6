"""Which loss would this catch? Any bit, any name, any file that does not survive a conversion, in any legal layout.

Every shard is compared with `megatron_by_hand`, an independent conversion in plain torch, and every way back with the
original files, byte for byte.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ferry
import megatron_by_hand as by_hand
from models import ASSETS, MODELS, NORM_HEAD, TORCH_BIN, Shelf, read_config, read_weights

LAYERS = 4
EXACT = [name for name in MODELS if name not in (*NORM_HEAD, *TORCH_BIN)]
EXAMPLES = int(os.environ.get("FERRY_EXAMPLES", "8"))
"""More than the usual few are drawn at random: `FERRY_EXAMPLES=100 pytest tests/property`."""
ONE_EXAMPLE_IS_MANY_FILES = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 8,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Asked:
    """The options of one conversion to Megatron, and the blocks of layers it must lead to."""

    options: dict[str, Any]
    blocks: tuple[tuple[int | None, ...], ...]

    def cut(self) -> by_hand.Cut:
        chosen = self.options
        return by_hand.Cut(
            chosen["tp"], chosen["pp"], chosen["vpp"], chosen["ep"], [list(block) for block in self.blocks],
            chosen["names"], chosen["experts"], chosen["vocab_multiple"],
        )  # fmt: skip


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def layouts(draw: st.DrawFn, config: dict[str, Any]) -> Asked:
    """Draw any layout that is legal for a model of `models.py` (all have 4 layers)."""
    experts = config.get("num_local_experts", 0)
    groups = config.get("multi_query_group_num") or config.get("num_key_value_heads") or config["num_attention_heads"]
    without_classic = experts or config["model_type"] == "qwen3"
    names = draw(st.sampled_from(["mcore", "te"] if without_classic else ["mcore", "te", "classic"]))
    total = draw(st.sampled_from([LAYERS, LAYERS, 6, 8]))
    noops = tuple(sorted(draw(st.permutations(range(total)))[: total - LAYERS]))
    pp = draw(st.sampled_from(divisors(total)))
    vpp = draw(st.sampled_from(divisors(total // pp))) if pp > 1 else 1
    sizes = [total // (pp * vpp)] * (pp * vpp)
    layer_list: tuple[int, ...] = ()
    if vpp == 1 and pp > 1 and draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, total), min_size=pp - 1, max_size=pp - 1)))
        sizes = [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
        layer_list = tuple(sizes)
    options = {
        "tp": draw(st.sampled_from(divisors(groups))), "pp": pp, "vpp": vpp,
        "ep": draw(st.sampled_from(divisors(experts))) if experts else 1,
        "layer_list": layer_list, "noop_layers": noops, "names": names,
        "experts": draw(st.sampled_from(["sequential", "grouped", "te_grouped"])) if experts else "sequential",
        "vocab_multiple": draw(st.sampled_from([1, 8, 128])),
        "iteration": draw(st.sampled_from(["", "release", "1", "4200000"])),
    }  # fmt: skip
    return Asked(options, blocks_of(total, noops, sizes))


def blocks_of(total: int, noops: tuple[int, ...], sizes: list[int]) -> tuple[tuple[int | None, ...], ...]:
    """Number the real layers and deal them out in model order."""
    numbers: list[int | None] = []
    for position in range(total):
        numbers.append(None if position in noops else position - sum(noop < position for noop in noops))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(tuple(numbers[start : start + size]) for start, size in zip(starts, sizes, strict=True))


@contextmanager
def folder() -> Iterator[Path]:
    """A directory for one example, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def rank_file(directory: Path, asked: Asked, tp: int, pp: int, ep: int) -> Path:
    """Return where Megatron looks for a rank."""
    iteration = asked.options["iteration"] or "release"
    folder_name = "release" if iteration == "release" else f"iter_{int(iteration):07d}"
    rank = f"mp_rank_{tp:02d}"
    rank += f"_{pp:03d}" if asked.options["pp"] > 1 else ""
    rank += f"_{ep:03d}" if asked.options["ep"] > 1 else ""
    assert (directory / "latest_checkpointed_iteration.txt").read_text() == iteration
    return directory / folder_name / rank / "model_optim_rng.pt"


def assert_shards_are_right(name: str, original: Path, directory: Path, asked: Asked) -> None:
    """Compare every rank with the conversion by hand: same keys, same order of nothing else, same bits."""
    plain = by_hand.unpack(name, read_weights(original), read_config(original))
    expected = by_hand.shards(plain, asked.cut())
    assert len(list(directory.rglob("model_optim_rng.pt"))) == len(expected)
    for rank, models in expected.items():
        path = rank_file(directory, asked, *rank)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        found = torch.load(path, mmap=True, weights_only=False, map_location="cpu")
        assert set(found) == {"args", "checkpoint_version", "iteration", *models}
        for key, model in models.items():
            assert_same_tensors(found[key], model, f"{path.parent.name} {key}")


def assert_same_tensors(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, item in expected.items():
        if isinstance(item, dict):
            assert_same_tensors(found[name], item, f"{where} {name}")
            continue
        assert found[name].dtype == item.dtype, f"{where} {name}"
        assert found[name].shape == item.shape, f"{where} {name}"
        assert torch.equal(bits(found[name]), bits(item)), f"{where} {name}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file of a model directory but the manifest that Ferry adds."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "ferry.json"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", EXACT)
@ONE_EXAMPLE_IS_MANY_FILES
@given(data=st.data())
def test_any_legal_layout_and_back_gives_the_original_files_byte_for_byte(
    models: Shelf, name: str, data: st.DataObject
) -> None:
    original = models(name)
    any_layout = layouts(read_config(original))
    asked, again = data.draw(any_layout, label="first"), data.draw(any_layout, label="second")
    with folder() as top:
        ferry.convert(source=original, target=top / "a", **asked.options)
        assert_shards_are_right(name, original, top / "a", asked)
        ferry.convert(direction="mg2mg", source=top / "a", target=top / "b", **again.options)
        if again.options["iteration"]:
            assert_shards_are_right(name, original, top / "b", again)
        for step in "ab":
            made = ferry.convert(direction="mg2hf", source=top / step, target=top / f"hf-{step}")
            assert made["same_as_parent"]
            assert files_of(top / f"hf-{step}") == files_of(original)


@pytest.mark.parametrize("name", EXACT)
def test_a_distributed_checkpoint_gives_the_original_files_byte_for_byte(models: Shelf, name: str) -> None:
    """The other format: its content is judged by megatron-core (`tests/interop`), here only that nothing is lost."""
    original = models(name)
    ep = 2 if "num_local_experts" in read_config(original) else 1
    with folder() as top:
        ferry.convert(source=original, target=top / "dist", tp=2, pp=2, ep=ep, format="torch_dist", vocab_multiple=8)
        ferry.convert(direction="mg2mg", source=top / "dist", target=top / "mg", pp=4)
        ferry.convert(direction="mg2mg", source=top / "mg", target=top / "again", tp=1, format="torch_dist")
        for step in ("dist", "mg", "again"):
            ferry.convert(direction="mg2hf", source=top / step, target=top / f"hf-{step}")
            assert files_of(top / f"hf-{step}") == files_of(original)


@pytest.mark.parametrize("name", NORM_HEAD)
@ONE_EXAMPLE_IS_MANY_FILES
@given(data=st.data())
def test_norm_head_changes_the_head_alone_and_says_so(models: Shelf, name: str, data: st.DataObject) -> None:
    original = models(name)
    any_layout = layouts(read_config(original))
    asked, again = data.draw(any_layout, label="first"), data.draw(any_layout, label="second")
    with folder() as top:
        made = ferry.convert(source=original, target=top / "a", **asked.options)
        assert len(made["changes"]) == 1
        assert "NormHead" in made["changes"][0]
        ferry.convert(direction="mg2mg", source=top / "a", target=top / "b", **again.options)
        back = ferry.convert(direction="mg2hf", source=top / "b", target=top / "hf")
        assert back["same_as_parent"]
        before, after = read_weights(original), read_weights(top / "hf")
        assert before.keys() == after.keys()
        changed = [key for key in before if not torch.equal(bits(before[key]), bits(after[key]))]
        assert changed == ["lm_head.weight"]
        expected = torch.nn.functional.normalize(before["lm_head.weight"].float())
        assert torch.allclose(after["lm_head.weight"].float(), expected, rtol=2**-7, atol=0)
        assert files_of(top / "hf").keys() == files_of(original).keys()


@pytest.mark.parametrize("name", TORCH_BIN)
@ONE_EXAMPLE_IS_MANY_FILES
@given(data=st.data())
def test_torch_bin_files_come_back_as_safetensors_with_the_same_bits(
    models: Shelf, name: str, data: st.DataObject
) -> None:
    original = models(name)
    asked = data.draw(layouts(read_config(original)))
    stored = {}
    for path in sorted(original.glob("pytorch_model*.bin")):
        stored |= torch.load(path, weights_only=True)
    if name == "qwen2-bin-sharded":
        stored.pop("lm_head.weight")  # the tied copy: safetensors of a tied model hold the embedding once
    with folder() as top:
        ferry.convert(source=original, target=top / "mg", **asked.options)
        made = ferry.convert(direction="mg2hf", source=top / "mg", target=top / "hf")
        assert made["same_as_parent"]
        assert_same_tensors(read_weights(top / "hf"), stored, name)
        assets = {path for path in files_of(original) if ".bin" not in path}
        assert set(files_of(top / "hf")) == {*assets, "model.safetensors"}
        assert ASSETS.keys() <= assets
