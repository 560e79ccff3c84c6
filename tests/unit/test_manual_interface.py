"""Which loss would this catch? A user of the manual whose script, variables and flags no longer do what they did.

The variables and flags are those of the manual's tables (`2_convert_mg_hf.sh`); the paths are ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ferry.cli import main
from models import ASSETS, Shelf, read_weights

VARIABLES = (
    "TP", "PP", "ORIGINAL_HF_WEIGHT", "CONVERT_MODEL_PATH", "TOKENIZER_PATH", "MODEL_SAVE_PATH",
)  # fmt: skip


class Manual:
    """A user's machine: the original model, and the places that the manual's variables name."""

    def __init__(self, top: Path, original: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.original, self.shards, self.saved = (
            original,
            top / "converted_weights_TP2PP2",
            top / "saved_dir_for_output",
        )
        self._monkeypatch, self._capsys = monkeypatch, capsys
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)

    def export(self, **variables: object) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, str(value))

    def export_all(self) -> None:
        self.export(
            TP=2, PP=2, ORIGINAL_HF_WEIGHT=self.original, CONVERT_MODEL_PATH=self.shards, TOKENIZER_PATH=self.original,
            MODEL_SAVE_PATH=self.saved,
        )  # fmt: skip

    def ferry(self, *words: object) -> dict[str, Any]:
        """Run one command line, expect success, and return what it says."""
        status = main(["convert", *map(str, words), "--json"])
        said = json.loads(self._capsys.readouterr().out)
        assert status == 0, said
        return said  # type: ignore[no-any-return]

    def refused(self, *words: object) -> dict[str, Any]:
        status = main(["convert", *map(str, words), "--json"])
        said = json.loads(self._capsys.readouterr().out)["error"]
        assert status == said["exit_status"] != 0
        return said  # type: ignore[no-any-return]


@pytest.fixture
def manual(
    models: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Manual:
    return Manual(tmp_path, models.copy("llama", tmp_path / "Llama2-13B"), monkeypatch, capsys)


def to_megatron(manual: Manual) -> list[object]:
    """The first table of the manual, word for word."""
    return [
        "--model-type", "GPT", "--loader", "llama2_hf", "--saver", "megatron",
        "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
        "--load-dir", manual.original, "--save-dir", manual.shards, "--tokenizer-model", manual.original,
    ]  # fmt: skip


def to_hugging_face(manual: Manual) -> list[object]:
    """The second table: `--save-dir` is the original model, the result goes into a folder of it."""
    return [
        "--model-type", "GPT", "--loader", "megatron", "--saver", "megatron", "--save-model-type", "huggingface",
        "--load-dir", manual.shards, "--save-dir", manual.original,
        "--target-tensor-parallel-size", 1, "--target-pipeline-parallel-size", 1,
    ]  # fmt: skip


def assert_shards(directory: Path) -> None:
    ranks = sorted(path.parent.name for path in directory.rglob("model_optim_rng.pt"))
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]


def assert_complete_model(directory: Path, original: Path) -> None:
    """The manual asks users to compare the directories and copy what is missing: nothing may be."""
    before, after = read_weights(original), read_weights(directory)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json", *ASSETS):
        assert (directory / name).read_bytes() == (original / name).read_bytes(), name


def test_the_flags_of_both_tables_go_there_and_back(manual: Manual) -> None:
    assert manual.ferry(*to_megatron(manual))["direction"] == "hf2mg"
    assert_shards(manual.shards)
    said = manual.ferry(*to_hugging_face(manual))
    assert (said["direction"], said["artifact"]) == ("mg2hf", str(manual.original / "mg2hf"))
    assert_complete_model(manual.original / "mg2hf", manual.original)


@pytest.mark.parametrize("word", ["hf2hg", "hf2mg"])
def test_the_script_s_argument_and_variables_are_enough(manual: Manual, word: str) -> None:
    manual.export_all()
    assert manual.ferry(word)["direction"] == "hf2mg"
    assert_shards(manual.shards)
    shutil.copytree(manual.shards, manual.saved)
    said = manual.ferry("mg2hf")
    assert said["artifact"] == str(manual.original / "mg2hf")
    assert_complete_model(manual.original / "mg2hf", manual.original)


@pytest.mark.parametrize("words", [("hf2hg", "mg2hf"), ()])
def test_variables_and_flags_together_do_what_the_flags_say(manual: Manual, words: tuple[str, ...]) -> None:
    """The script exports its variables and passes them as flags as well; the python command alone has no direction."""
    manual.export_all()
    manual.ferry(*words[:1], *to_megatron(manual))
    assert_shards(manual.shards)
    manual.ferry(*words[1:], *to_hugging_face(manual))
    assert_complete_model(manual.original / "mg2hf", manual.original)


def test_shards_of_a_trainer_need_only_the_tokenizer_path(manual: Manual) -> None:
    """A trainer saves weights alone: config and tokenizer come from TOKENIZER_PATH."""
    manual.export_all()
    manual.ferry("hf2hg")
    shutil.copytree(manual.shards, manual.saved, ignore=shutil.ignore_patterns("hf_assets", "ferry.json"))
    manual.ferry("mg2hf")
    assert_complete_model(manual.original / "mg2hf", manual.original)


def test_without_a_config_anywhere_the_variable_to_set_is_named(manual: Manual) -> None:
    manual.ferry(*to_megatron(manual))
    shutil.copytree(manual.shards, manual.saved, ignore=shutil.ignore_patterns("hf_assets", "ferry.json"))
    assert "TOKENIZER_PATH" in manual.refused("mg2hf", manual.saved, manual.original)["repair"]


def test_the_script_can_be_run_twice(manual: Manual) -> None:
    manual.export_all()
    manual.ferry("hf2hg")
    assert manual.refused("hf2hg")["code"] == "output.exists"
    manual.ferry("hf2hg", "--overwrite")
    assert_shards(manual.shards)


def test_tp_and_pp_are_checked_against_the_shards_on_the_way_back(manual: Manual) -> None:
    manual.ferry(*to_megatron(manual))
    manual.export(TP=8, PP=1, MODEL_SAVE_PATH=manual.shards, ORIGINAL_HF_WEIGHT=manual.original)
    assert "tp=2, expected tp=8" in manual.refused("mg2hf")["message"]
    assert not (manual.original / "mg2hf").exists()


def test_a_tokenizer_of_its_own_directory_is_taken(manual: Manual, tmp_path: Path) -> None:
    """TOKENIZER_PATH may be another directory than the weights."""
    other = tmp_path / "tokenizers"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"another": true}')
    manual.export_all()
    manual.export(TOKENIZER_PATH=other)
    manual.ferry("hf2hg")
    assert (manual.shards / "hf_assets/tokenizer.json").read_text() == '{"another": true}'
    assert (manual.shards / "hf_assets/config.json").read_bytes() == (manual.original / "config.json").read_bytes()


def test_a_tokenizer_file_stands_for_its_directory(manual: Manual) -> None:
    """`--tokenizer-model .../tokenizer.model` is how many scripts spell it."""
    words = to_megatron(manual)
    words[-1] = manual.original / "tokenizer.model"
    manual.ferry(*words)
    assert_shards(manual.shards)


def test_an_empty_variable_is_not_a_path(manual: Manual) -> None:
    manual.export_all()
    manual.export(TOKENIZER_PATH="", TP="")
    manual.ferry("hf2hg", "--tp", 2)
    assert_shards(manual.shards)


def test_a_missing_variable_is_named(manual: Manual) -> None:
    manual.export(TP=2, ORIGINAL_HF_WEIGHT=manual.original)
    assert "CONVERT_MODEL_PATH" in manual.refused("hf2hg")["repair"]


def test_a_model_that_ferry_pulled_is_an_original_too(manual: Manual) -> None:
    """The same script, with a model that has a manifest."""
    assert main(["pull", str(manual.original), "-o", str(manual.original.parent / "pulled"), "--quiet"]) == 0
    manual._capsys.readouterr()
    manual.original = manual.original.parent / "pulled"
    manual.export_all()
    manual.ferry("hf2hg")
    shutil.copytree(manual.shards, manual.saved)
    assert manual.ferry("mg2hf")["artifact"] == str(manual.original / "mg2hf")


def test_the_command_itself_reads_the_environment(manual: Manual) -> None:
    """Once as a real process, as the script would start it."""
    manual.export_all()
    done = subprocess.run(
        [sys.executable, "-m", "ferry", "convert", "hf2hg"], env=dict(os.environ), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_shards(manual.shards)
