"""The demo's data: made from the standard library alone, the same every time, with nothing held out in the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib_text.py"


def made(output: Path, hash_seed: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(output)],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_demo_data_are_the_same_every_time_and_the_parts_are_disjoint(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a", "1"), made(tmp_path / "b", "2")
    for name in ("train.jsonl", "heldout.jsonl", "text.txt", "heldout.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first["train_sha256"] == second["train_sha256"]
    parts = [
        [json.loads(line)["messages"] for line in (tmp_path / "a" / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    ]
    assert [len(part) for part in parts] == [first["train_rows"], first["heldout_rows"]]
    assert len(parts[0]) >= 300
    assert len(parts[1]) >= 40
    answers = [{messages[1]["content"] for messages in part} for part in parts]
    assert not answers[0] & answers[1]
    assert all(20 < len(answer) <= 500 for answer in answers[0] | answers[1])
