"""Which loss would this catch? An hour of steps made before a wrong word in the last one is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ferry
from ferry.control.voyage.config import RunConfig
from ferry.control.voyage.plan import plan
from ferry.core.errors import ConfigError, FerryError

GOOD = """\
name: small
steps:
  - name: one
    command: ["${python}", "-c", "print(1)"]
"""


def error_of(tmp_path: Path, text: str, **options: Any) -> FerryError:
    """Run a voyage that is wrong, and check that nothing of it was begun."""
    file = tmp_path / "voyage.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        ferry.run(file=file, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return raised.value


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps:", "stepps:", "voyage.yaml, line 2: unknown key 'stepps' (did you mean 'steps'?)"),
        ("command:", "comand:", "voyage.yaml, line 4: unknown key 'comand' (did you mean 'command'?)"),
        ("name: one", "name: 1-one", "voyage.yaml, line 3: '1-one' is not a name"),
        ("${python}", "${pyton}", "voyage.yaml, line 4: ${pyton}: unknown name 'pyton' (did you mean 'python'?)"),
        ("print(1)", "${steps.two.x}", "line 4: steps.two.x: there is no such step"),
        ("print(1)", "${steps.one.x}", "line 4: steps.one.x: it is not done before this"),
        ('["${python}", "-c", "print(1)"]', "ls", "expected a list of words"),
        ("name: small", "name: small\nvariables: {output: 1}", "a variable cannot be named 'output'"),
        ("name: small", "name: small\nname: large", "line 1: key 'name' is given twice"),
        ("name: small", "name: small\ngates: [steps.one.value = 1]", "line 2: gate 'steps.one.value = 1': expected"),
        ("name: small", "name: small\ngates: [steps.on.value]", "no such step (did you mean 'one'?)"),
        ("name: small", "name: small\ngates: [one == 1]", "unknown name 'one'; quote text, or begin with steps."),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in str(error_of(tmp_path, GOOD.replace(old, new)))


VERBS = """\
steps:
  - name: shards
    verb: convert
    with:
      source: model
      target: ${output}/shards
      tp: 2
  - name: check
    verb: verify
    with:
      path: ${steps.shards.artifact}
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("verb: verify", "verb: verfy", "line 9: step 'check': unknown verb 'verfy' (did you mean 'verify'?)"),
        ("tp: 2", "tpp: 2", "step 'shards': unknown key 'tpp' from voyage.yaml, line 7 (did you mean 'tp'?)"),
        ("tp: 2", "tp: 0", "step 'shards': tp=0 from voyage.yaml, line 7: expected at least 1"),
        ("path: ${", "paths: ${", "step 'check': unknown key 'paths' from voyage.yaml, line 11 (did you mean 'path'?)"),
        ("path: ${steps.shards.artifact}", "threads: 1", "step 'check': path is missing"),
        ("${steps.shards.artifact}", "${steps.shards}", "name a field of its result"),
        ("${output}/shards", "${steps.check.artifact}", "line 6: steps.check.artifact: it is not done before this"),
    ],
)
def test_configs_of_verbs_are_checked_as_far_as_they_are_known(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in str(error_of(tmp_path, VERBS.replace(old, new)))


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    text = str(error_of(tmp_path, VERBS.replace("tp: 2", "tpp: 2").replace("verify", "verfy")))
    assert "'tpp'" in text
    assert "'verfy'" in text


def test_unknown_steps_and_variables_of_the_command_line_are_named(tmp_path: Path) -> None:
    assert "did you mean 'one'?" in str(error_of(tmp_path, GOOD, only="on"))
    assert "has no variable 'x'" in str(error_of(tmp_path, GOOD, variables={"x": 1}))
    assert "cannot be given together" in str(error_of(tmp_path, GOOD, only="one", from_step="one"))


def test_a_plan_names_every_step_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "voyage.yaml").write_text(GOOD + '  - name: two\n    command: [ls, "${steps.one.value}"]\n')
    planned = plan(RunConfig(file=tmp_path / "voyage.yaml", output=tmp_path / "out"))
    assert [step["state"] for step in planned.details["steps"]] == ["make", "make"]
    assert "planned when one is done" in planned.choices[1]
    assert not (tmp_path / "out").exists()


def test_a_first_step_that_is_impossible_is_refused_by_the_plan(tmp_path: Path) -> None:
    (tmp_path / "voyage.yaml").write_text(VERBS.replace("source: model", f"source: {tmp_path}/nothing"))
    with pytest.raises(FerryError, match="step 'shards'"):
        plan(RunConfig(file=tmp_path / "voyage.yaml", output=tmp_path / "out"))
