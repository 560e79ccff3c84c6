"""What Ferry costs before it does anything: imported modules and CPU time."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

HEAVY = {"torch", "transformers", "fastapi", "numpy", "pydantic", "yaml", "jinja2", "huggingface_hub", "gguf"}


def imported_by(statement: str) -> set[str]:
    """Return the top-level modules that a statement imports, in a fresh Python."""
    code = f"import sys, json\n{statement}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def cpu_seconds(*words: str) -> float:
    """Return the least user and system CPU time of several runs: the noise of a busy machine only adds."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(10))


def test_importing_ferry_imports_nothing_heavy() -> None:
    assert not imported_by("import ferry") & HEAVY


def test_naming_the_verbs_imports_nothing_heavy() -> None:
    assert not imported_by("import ferry; dir(ferry)") & HEAVY


def test_help_imports_neither_libraries_nor_the_slow_part_of_the_standard_library() -> None:
    modules = imported_by("from ferry.cli import main; main(['--help'])")
    assert not modules & (HEAVY | {"typing", "dataclasses", "inspect", "argparse"})


def test_help_of_a_verb_imports_no_framework() -> None:
    assert not imported_by("from ferry.cli import main; main(['convert', '--help'])") & (HEAVY - {"pydantic"})


def test_help_costs_at_most_ten_times_a_python_that_does_nothing() -> None:
    assert cpu_seconds("-m", "ferry", "--help") <= 10 * cpu_seconds("-c", "pass")
