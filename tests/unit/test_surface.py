"""The command line is a promise: it changes only together with tests/golden/cli.txt."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from ferry.core.options import Option, options_of
from ferry.core.verb import discover, load, load_config

GOLDEN = Path(__file__).parent.parent / "golden"
GLOBAL_FLAGS = {"--help", "-h", "--json", "--dry-run", "--config", "--set", "--quiet", "-q"}
MAY_MEAN_ANOTHER_THING = {"-q"}
"""The manual starts its service with `-q smoothquant`; `--quiet` is always what it says."""
EVERY_OPTION = [
    pytest.param(option, id=f"{name}-{option.name}")
    for name, verb in discover().items()
    for option in options_of(load_config(verb), name)
]


def test_the_command_line_is_the_frozen_one() -> None:
    surface = runpy.run_path(str(GOLDEN / "update_cli.py"))["surface"]()
    frozen = (GOLDEN / "cli.txt").read_text(encoding="utf-8")
    assert surface == frozen, "if this is meant: python tests/golden/update_cli.py"


@pytest.mark.parametrize("option", EVERY_OPTION)
def test_every_option_has_a_sentence_and_no_flag_of_all_verbs(option: Option) -> None:
    assert option.help.endswith(".")
    assert not set(option.flags) & GLOBAL_FLAGS
    assert option.short not in GLOBAL_FLAGS - MAY_MEAN_ANOTHER_THING


@pytest.mark.parametrize("name", list(discover()))
def test_every_part_that_a_verb_names_is_there(name: str) -> None:
    verb = discover()[name]
    parts = [verb.config, verb.run, verb.report, verb.plan, verb.exit_status]
    assert all(callable(load(part)) for part in parts if part)
    assert verb.summary.endswith(".")
