"""Which loss would this catch? Work made twice, stale results taken for fresh ones, another's directory replaced, a
voyage that goes on where it must stop, a kill that cannot be continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import ferry
from ferry.core.errors import ConfigError, FerryError, GateError, IntegrityError, OutputError, UnavailableError
from models import Shelf

COUNT = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
file.write_text(file.read_text() + "x" if file.exists() else "x")
print("working")
print(json.dumps({"times": len(file.read_text()), "word": sys.argv[2]}))
"""


class Yard:
    """A directory with a voyage file and a script that counts how often it was run."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.file = top / "voyage.yaml"
        self.output = top / "out"
        (top / "count.py").write_text(COUNT)

    def counting(self, name: str, *words: str) -> dict[str, Any]:
        return {"name": name, "command": ["${python}", "count.py", f"{self.top}/{name}.count", *(words or ["-"])]}

    def write(self, *steps: dict[str, Any], gates: list[str] | None = None) -> None:
        self.file.write_text(yaml.safe_dump({"name": "trial", "steps": steps, "gates": gates or []}))

    def run(self, **options: Any) -> dict[str, str]:
        """Run the voyage and return what became of each step."""
        result = ferry.run(file=self.file, output=self.output, **options)
        return {entry["name"]: entry["status"] for entry in result["steps"]}

    def times(self, name: str) -> int:
        path = self.top / f"{name}.count"
        return len(path.read_text()) if path.exists() else 0


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path)


@pytest.fixture
def sailing(yard: Yard, models: Shelf) -> dict[str, Any]:
    """A step that converts a small model."""
    source, target = str(models("llama-tied")), "${output}/shards"
    return {"name": "shards", "verb": "convert", "with": {"source": source, "target": target, "tp": 2}}


def test_a_finished_step_is_skipped_and_a_changed_one_is_made_again(yard: Yard) -> None:
    yard.write(yard.counting("one"), yard.counting("two", "${steps.one.word}"), yard.counting("three"))
    assert set(yard.run().values()) == {"done"}
    assert set(yard.run().values()) == {"skipped"}
    yard.write(yard.counting("one", "new"), yard.counting("two", "${steps.one.word}"), yard.counting("three"))
    assert yard.run() == {"one": "done", "two": "done", "three": "skipped"}
    assert (yard.times("one"), yard.times("two"), yard.times("three")) == (2, 2, 1)


def test_a_step_is_made_again_when_a_file_it_names_changes(yard: Yard) -> None:
    (yard.top / "data.txt").write_text("a")
    yard.write(yard.counting("one", "data.txt"))
    yard.run()
    (yard.top / "data.txt").write_text("b")
    assert yard.run() == {"one": "done"}


def test_only_and_from_make_again_and_keep_the_rest(yard: Yard) -> None:
    yard.write(yard.counting("one"), yard.counting("two", "${steps.one.word}"), yard.counting("three"))
    with pytest.raises(ConfigError, match="needs the result of step 'one'"):
        yard.run(only="two")
    yard.run()
    assert yard.run(only="two") == {"one": "kept", "two": "done", "three": "kept"}
    assert yard.run(from_step="two") == {"one": "kept", "two": "done", "three": "done"}


def test_a_failed_gate_stops_the_voyage_names_both_values_and_leaves_a_report(yard: Yard) -> None:
    gates = ["steps.one.word == steps.two.word"]
    yard.write(yard.counting("one", "tide"), yard.counting("two", "ebb"), yard.counting("three"), gates=gates)
    done = subprocess.run(
        [sys.executable, "-m", "ferry", "run", str(yard.file), "-o", str(yard.output)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 8
    assert "steps.one.word is 'tide', steps.two.word is 'ebb'" in done.stderr
    assert yard.times("three") == 0
    page = (yard.output / "report.html").read_text()
    assert "The voyage stopped" in page
    assert "steps.one.word == steps.two.word" in page


@pytest.mark.parametrize(
    ("command", "error", "said"),
    [
        (["${python}", "-c", "import sys; sys.exit('no wind')"], GateError, "ended with status 1: no wind"),
        (["no-such-program"], UnavailableError, "cannot start no-such-program"),
    ],
)
def test_a_command_that_fails_stops_the_voyage(
    yard: Yard, command: list[str], error: type[FerryError], said: str
) -> None:
    yard.write({"name": "one", "command": command}, yard.counting("two"))
    with pytest.raises(error, match=f"step 'one': .*{said}"):
        yard.run()
    assert yard.times("two") == 0


def test_a_model_beyond_its_limits_stops_the_voyage_is_in_the_report_and_is_made_again(
    yard: Yard, smollm2: Path
) -> None:
    from training import tiny

    model = str(tiny("Llama", smollm2, yard.top / "model", num_hidden_layers=1))
    text = yard.top / "text.txt"
    text.write_text(" ".join(str(number) for number in range(200)))
    told = {"model": model, "method": "rtn", "evaluation": str(text), "output": "${output}/small", "seq_len": 16}
    step = {"name": "small", "verb": "quantize", "with": {**told, "limits": {"max_kl": 1e-9}}}
    yard.write(step, yard.counting("two"))
    with pytest.raises(GateError, match="step 'small': ferry quantize ended with the verdict 1; its numbers are in"):
        yard.run()
    assert yard.times("two") == 0
    page = (yard.output / "report.html").read_text()
    assert "KL to the original" in page
    assert "not all hold" in page
    assert 'href="small/quantization.html"' in page
    step["with"]["limits"] = {"max_kl": 100.0, "min_top1": 0.0, "max_perplexity_ratio": 100.0}
    yard.write(step, yard.counting("two"))
    assert yard.run() == {"small": "done", "two": "done"}


def test_a_converted_model_is_skipped_replaced_when_the_config_changes_and_never_made_twice(
    yard: Yard, sailing: dict[str, Any]
) -> None:
    check = {"name": "check", "verb": "verify", "with": {"path": "${steps.shards.artifact}"}}
    yard.write(sailing, check)
    assert yard.run() == {"shards": "done", "check": "done"}
    assert yard.run() == {"shards": "skipped", "check": "skipped"}
    sailing["with"]["tp"] = 1
    yard.write(sailing, check)
    assert yard.run() == {"shards": "done", "check": "done"}
    assert yard.run(only="shards") == {"shards": "done", "check": "kept"}
    shutil.rmtree(yard.output / "shards")
    assert yard.run() == {"shards": "done", "check": "skipped"}


def test_a_voyage_can_be_moved_with_its_directory(yard: Yard, sailing: dict[str, Any]) -> None:
    yard.write(sailing, {"name": "look", "verb": "inspect", "with": {"path": "${steps.shards.artifact}"}})
    yard.run()
    os.rename(yard.output, yard.top / "elsewhere")
    yard.output = yard.top / "elsewhere"
    assert yard.run() == {"shards": "skipped", "look": "skipped"}


def test_a_directory_of_somebody_else_is_never_replaced(yard: Yard, sailing: dict[str, Any]) -> None:
    (yard.output / "shards").mkdir(parents=True)
    (yard.output / "shards" / "letter.txt").write_text("mine")
    yard.write(sailing)
    with pytest.raises(OutputError, match="was not made by this voyage"):
        yard.run()
    assert (yard.output / "shards" / "letter.txt").read_text() == "mine"


def test_a_result_that_was_changed_by_hand_is_not_replaced(yard: Yard, sailing: dict[str, Any]) -> None:
    yard.write(sailing)
    yard.run()
    (yard.output / "shards" / "ferry.json").unlink()
    with pytest.raises(OutputError, match="or was changed since"):
        yard.run()


def test_the_output_of_another_voyage_and_a_strange_report_are_refused(yard: Yard) -> None:
    yard.write(yard.counting("one"))
    yard.output.mkdir()
    (yard.output / "report.html").write_text("mine")
    with pytest.raises(OutputError, match="was not made by a voyage"):
        yard.run()
    (yard.output / "report.html").unlink()
    yard.run()
    yard.file.write_text(yard.file.read_text().replace("trial", "other"))
    with pytest.raises(OutputError, match="belongs to the voyage 'trial'"):
        yard.run()


def test_an_error_of_a_verb_keeps_its_kind_and_names_the_step(yard: Yard, sailing: dict[str, Any]) -> None:
    yard.write(sailing, {"name": "check", "verb": "verify", "with": {"path": "${steps.shards.artifact}"}})
    yard.run(only="shards")
    shard = next((yard.output / "shards").rglob("*.pt"))
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(IntegrityError, match="step 'check'"):
        yard.run()


def test_each_verb_has_a_run_record_that_the_voyage_names(yard: Yard, sailing: dict[str, Any]) -> None:
    yard.write(sailing)
    result = ferry.run(file=yard.file, output=yard.output)
    record = Path(os.environ["FERRY_HOME"]) / "runs" / result["steps"][0]["record"]
    assert json.loads((record / "result.json").read_text())["status"] == "ok"
    assert "voyage.yaml, step shards" in json.loads((record / "config.json").read_text())["origins"]["tp"]


WAIT_ONCE = """
import os, pathlib, signal, sys
file = pathlib.Path(sys.argv[1])
if not file.exists():
    file.write_text(str(os.getpid()))
    print("waiting", file=sys.stderr, flush=True)
    os.open(sys.argv[2], os.O_WRONLY)  # tells the test, through a pipe by name, that the wait has begun
    signal.pause()
print('{"arrived": true}')
"""


def test_a_voyage_that_was_killed_goes_on_with_the_step_that_was_not_finished(yard: Yard) -> None:
    (yard.top / "wait.py").write_text(WAIT_ONCE)
    mark, pipe = yard.top / "waited", yard.top / "pipe"
    os.mkfifo(pipe)
    wait = {"name": "wait", "command": ["${python}", "wait.py", str(mark), str(pipe)]}
    yard.write(yard.counting("one"), wait, yard.counting("three"))
    process = subprocess.Popen([sys.executable, "-m", "ferry", "run", str(yard.file), "-o", str(yard.output)])
    with open(pipe, "rb"):
        process.kill()
        assert process.wait() == -signal.SIGKILL
        os.kill(int(mark.read_text()), signal.SIGKILL)
    assert yard.run() == {"one": "skipped", "wait": "done", "three": "done"}
    assert yard.times("one") == 1


def test_a_kill_between_the_artifact_and_its_entry_does_not_make_it_a_stranger(
    yard: Yard, sailing: dict[str, Any]
) -> None:
    yard.write(sailing)
    yard.run()
    # What a kill at that moment leaves: the artifact, the claim, and no entry.
    entry = yard.output / ".ferry" / "voyage" / "steps" / "shards.json"
    started = json.loads((yard.output / "shards" / "ferry.json").read_text())["created"]
    entry.unlink()
    claim = {"target": "shards", "verb": "convert", "since": started}
    (yard.output / ".ferry" / "voyage" / "claims" / "shards.json").write_text(json.dumps(claim))
    assert yard.run() == {"shards": "done"}


def test_two_processes_cannot_make_one_voyage(yard: Yard) -> None:
    inner = ["${python}", "-m", "ferry", "run", "${here}/voyage.yaml", "-o", "${output}"]
    yard.write({"name": "again", "command": inner})
    with pytest.raises(GateError, match="under way in another process"):
        yard.run()
