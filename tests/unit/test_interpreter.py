"""How modules are started in an interpreter of their own: not with code that lies in the working directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from ferry.core.interpreter import foreign_module_words, module_words

WAYS = {"ours": module_words, "any": lambda module: [sys.executable, *foreign_module_words(module)]}


@pytest.mark.parametrize("way", WAYS)
def test_a_module_runs_with_its_words_and_without_those_of_the_working_directory(way: str, tmp_path: Path) -> None:
    for name in ("json", "own"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the working directory was run')")
    (tmp_path / "data").write_text("[1]")
    done = subprocess.run(
        [*WAYS[way]("json.tool"), "--compact", "data"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[1]\n"), done.stderr
    refused = subprocess.run([*WAYS[way]("own")], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "No module named" in refused.stderr
