"""Which loss would this catch? A new family that needs a second edit, or a playbook that no longer works.

The family file and the config are taken from the page itself, so the page cannot become wrong unseen.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parent.parent.parent
PAGE = (REPOSITORY / "docs/porting-a-family.md").read_text(encoding="utf-8")
MOST_LINES = 80


def block(language: str) -> str:
    """Return the first code block of a language on the page."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with one more file, and nothing else changed."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "src/ferry", tmp_path / "package/ferry", ignore=ignore)
    (tmp_path / "package/ferry/families/heron.py").write_text(block("python"))
    return tmp_path / "package"


@pytest.fixture
def heron(tmp_path: Path) -> Path:
    """A random Heron with the sizes of the page's config."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (139, 32), "norm.weight": (32,), "unembed.weight": (139, 32)}
    for layer in range(4):
        shapes |= {
            f"blocks.{layer}.{name}": shape
            for name, shape in {
                "norm_a.weight": (32,), "norm_b.weight": (32,), "attn.wqkv.weight": (64, 32), "attn.wqkv.bias": (64,),
                "attn.out.weight": (32, 32), "attn.inv_freq": (4,), "ff.gate_up.weight": (96, 32),
                "ff.down.weight": (32, 48),
            }.items()
        }  # fmt: skip
    torch.manual_seed(0)
    directory = tmp_path / "heron"
    directory.mkdir()
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(block("json"))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def ferry(package: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n"
         "from ferry.cli import main\nimport ferry\n"
         f"assert ferry.__file__.startswith({str(package)!r}), ferry.__file__\n"
         "sys.exit(main(sys.argv[1:]))", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_page_s_file_is_all_that_a_new_family_needs(package: Path, heron: Path, tmp_path: Path) -> None:
    for words in (
        ("convert", heron, tmp_path / "a", "--tp", 2, "--pp", 2, "--model-type", "heron-chat"),
        ("convert", "mg2mg", tmp_path / "a", tmp_path / "b", "--pp", 2, "--vpp", 2),
        ("verify", tmp_path / "b"),
        ("inspect", tmp_path / "b"),
        ("convert", tmp_path / "b", tmp_path / "back"),
    ):
        done = ferry(package, *words)
        assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (heron / name).read_bytes(), name


def test_the_shards_hold_what_the_page_promises(package: Path, heron: Path, tmp_path: Path) -> None:
    assert ferry(package, "convert", heron, tmp_path / "mg", "--tp", 2).returncode == 0
    shard = torch.load(tmp_path / "mg/release/mp_rank_01/model_optim_rng.pt", weights_only=False)
    source = load_file(heron / "model.safetensors")
    query, key, value = source["blocks.2.attn.wqkv.bias"].split([32, 16, 16])
    gate, up = source["blocks.2.ff.gate_up.weight"].chunk(2)
    model, args = shard["model"], shard["args"]
    prefix = "decoder.layers.2."
    second_group = torch.cat([query[16:], key[8:], value[8:]])
    assert torch.equal(model[prefix + "self_attention.linear_qkv.bias"], second_group)
    assert torch.equal(model[prefix + "mlp.linear_fc1.weight"], torch.cat([gate[24:], up[24:]]))
    assert not [name for name in model if "inv_freq" in name]
    assert (args.add_qkv_bias, args.rotary_base, args.norm_epsilon, args.max_position_embeddings) == (
        True, 50000, 1e-06, 512,
    )  # fmt: skip


def test_without_the_file_the_family_is_unknown(heron: Path, tmp_path: Path) -> None:
    done = ferry(REPOSITORY / "src", "convert", heron, tmp_path / "mg")
    assert done.returncode == 3
    assert "docs/porting-a-family.md" in done.stderr


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "src/ferry/families").glob("*.py")), ids=lambda path: path.stem
)  # fmt: skip
def test_every_family_is_a_short_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (MOST_LINES if path.stem != "registry" else 100)
