"""The JSON-Schema-Test-Suite, from the source package of `jsonschema`: every group right, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ferry.guided.refusal import Refusal
from guided.writing import automaton, writes

DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}
LEAST_SHARE_RIGHT = 0.8
REFUSED_WORDS = {
    "$dynamicRef", "$recursiveRef", "$ref", "$schema", "format", "minProperties", "multipleOf", "not", "uniqueItems",
}  # fmt: skip
NARROWED = "formats we know are enforced, where these groups want an annotation"


@pytest.fixture(scope="session")
def suite(test_cache: Path) -> Path:
    name = f"jsonschema-{version('jsonschema')}"
    archive = test_cache / f"{name}.tar.gz"
    if not archive.is_file():
        command = ["pip", "download", "--no-deps", "--no-binary", "jsonschema", "--dest", str(test_cache)]
        done = subprocess.run(
            [sys.executable, "-m", *command, name.replace("-", "==")], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"the source package of jsonschema cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    target = test_cache / name
    if not (target / "json").is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(test_cache, [one for one in packed.getmembers() if "/json/tests/" in one.name])
    return target / "json" / "tests"


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_group_of_the_official_suite_is_right_or_refused_by_name(suite: Path, draft: str) -> None:
    verdicts: Counter[str] = Counter()
    refusals: list[tuple[str, Refusal]] = []
    for path in sorted((suite / draft).glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            name = f"{path.name}: {group['description']}"
            try:
                wrong = wrong_instances(with_draft(group["schema"], draft), group["tests"])
            except Refusal as refusal:
                refusals.append((name, refusal))
                continue
            assert not [one for one in wrong if not one["valid"]], name
            assert not wrong or path.name == "format.json", (name, wrong, NARROWED)
            verdicts["narrowed" if wrong else "right"] += 1
    assert [name for name, refusal in refusals if refusal.keyword not in REFUSED_WORDS] == []
    assert [name for name, refusal in refusals if not refusal.pointer.startswith("#")] == []
    assert verdicts["right"] >= LEAST_SHARE_RIGHT * (verdicts.total() + len(refusals)), (verdicts, len(refusals))


def with_draft(schema: Any, draft: str) -> Any:
    return {"$schema": DRAFTS[draft], **schema} if isinstance(schema, dict) else schema


def wrong_instances(schema: Any, tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        matcher = automaton(schema)
    except Refusal as refusal:
        if refusal.code == "guided.unsatisfiable":
            return [one for one in tests if one["valid"]]
        raise
    return [one for one in tests if writes(matcher, one["data"]) is not one["valid"]]
