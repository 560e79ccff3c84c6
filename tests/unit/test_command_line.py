"""The command as its users meet it: exit statuses, one-line errors, one JSON document, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

FERRY = [sys.executable, "-m", "ferry"]
STRANGE_VERB = """
import sys
from ferry.command import execute
from ferry.core.config import VerbConfig, option
from ferry.core.plan import Plan
from ferry.core.verb import Verb

class Config(VerbConfig):
    how: str = option("well", help="How it ends.", positional=True)

def plan(config):
    return Plan("strange", "do something strange", {"how": config.how}, output="out")

def run(config, reporter):
    print("a library prints")
    if config.how == "defect":
        raise RuntimeError("the tide\\nis out")
    if config.how == "wait":
        reporter.event("waiting")
        sys.stderr.write("waiting\\n")
        sys.stderr.flush()
        sys.stdin.read()
    return {"how": config.how}

def report(result):
    return f"it went {result['how']}"

def verdict(result):
    return 5 if result["how"] == "badly" else 0

if __name__ == "__main__":
    parts = {part: f"strange:{part}" for part in ("plan", "run", "report")}
    verb = Verb("strange", "Does something strange.", "strange:Config", **parts, exit_status="strange:verdict")
    sys.exit(execute("strange", sys.argv[1:], {"strange": verb}))
"""


def ferry(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **variables}
    return subprocess.run([*FERRY, *words], capture_output=True, text=True, env=environ, check=False)


def strange(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a verb made for these tests, through the same door as every other."""
    (folder / "strange.py").write_text(STRANGE_VERB)
    environ = {**os.environ, "PYTHONPATH": str(folder), **variables}
    command = [sys.executable, "-m", "strange", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False, cwd=folder)


def outcome(home: str) -> dict[str, object]:
    (path,) = Path(home).glob("runs/*/result.json")
    document: dict[str, object] = json.loads(path.read_text())
    return document


def test_help_names_every_verb() -> None:
    done = ferry("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("pull", "convert", "inspect", "verify", "lineage", "runs", "config"))
    assert ferry().stdout == ferry("help").stdout == done.stdout


def test_help_of_a_verb_is_the_same_from_both_sides() -> None:
    assert ferry("help", "convert").stdout == ferry("convert", "--help").stdout
    assert "--tensor-model-parallel-size" in ferry("convert", "--help").stdout


def test_an_unknown_verb_is_answered_with_the_nearest_one() -> None:
    done = ferry("convrt")
    assert done.returncode == 2
    assert (
        done.stderr == "error: unknown verb 'convrt' (did you mean 'convert'?); see `ferry --help` [cli.unknown-verb]\n"
    )
    assert done.stdout == ""


def test_an_error_as_json_is_one_document_on_stdout() -> None:
    done = ferry("inspect", "--json", "--tnsors", "x")
    assert (done.returncode, done.stderr) == (2, "")
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"code", "message", "repair", "exit_status"}
    assert (error["code"], error["exit_status"]) == ("config.invalid", 2)


def test_switches_may_stand_before_the_verb() -> None:
    assert json.loads(ferry("--json", "runs").stdout) == json.loads(ferry("runs", "--json").stdout)


def test_a_verb_that_only_looks_has_no_dry_run() -> None:
    assert "[config.no-plan]" in ferry("inspect", "x", "--dry-run").stderr


def test_config_show_tells_where_each_value_comes_from(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("convert: {tp: 2}\n")
    words = ["config", "show", "convert", "--origin", "--config", str(tmp_path / "a.yaml"), "--ep", "4", "--json"]
    done = ferry(*words, PP="3")
    origins = json.loads(done.stdout)["origins"]
    found = {name: origins[name] for name in ("tp", "pp", "ep", "vpp")}
    expected = {"tp": f"file {tmp_path}/a.yaml", "pp": "environment PP", "ep": "flag --ep", "vpp": "default"}
    assert found == expected


def test_what_config_show_prints_can_be_read_back(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        ferry("config", "show", "convert", "hf2mg", "a", "b", "--layer-list", "4,3").stdout
    )
    again = ferry("config", "show", "convert", "--config", str(tmp_path / "a.yaml"))
    assert again.stdout == (tmp_path / "a.yaml").read_text()


def test_a_dry_run_writes_nothing_at_all(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = strange(tmp_path, "--dry-run", FERRY_HOME=str(home))
    assert (done.returncode, home.exists()) == (0, False)
    assert "do something strange" in done.stdout


def test_with_json_what_a_library_prints_goes_to_stderr(tmp_path: Path) -> None:
    done = strange(tmp_path, "--json")
    assert json.loads(done.stdout)["how"] == "well"
    assert "a library prints" in done.stderr


def test_a_verdict_decides_the_exit_status(tmp_path: Path) -> None:
    assert strange(tmp_path, "badly").returncode == 5


def test_a_defect_is_one_line_and_its_traceback_is_in_the_record(tmp_path: Path) -> None:
    done = strange(tmp_path, "defect", "--quiet")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: RuntimeError: the tide is out; this is a defect of Ferry; the traceback is in ")
    error = outcome(os.environ["FERRY_HOME"])["error"]
    assert isinstance(error, dict)
    assert "in run\n" in error["traceback"]


def test_a_home_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    done = strange(tmp_path, FERRY_HOME="/proc/nowhere")
    assert (done.returncode, done.stdout) == (0, "a library prints\nit went well\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: no run record is kept")


def stop(folder: Path, signum: int) -> int:
    """Start a run, wait until it is at work, send a signal, return the exit status."""
    (folder / "strange.py").write_text(STRANGE_VERB)
    command = [sys.executable, "-m", "strange", "wait"]
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        command,
        env=environ,
        cwd=folder,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # A test run in the background of a shell inherits that SIGINT is ignored; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    stderr: IO[bytes] | None = process.stderr
    assert stderr is not None
    assert stderr.readline() == b"waiting\n"
    process.send_signal(signum)
    _, rest = process.communicate(timeout=60)
    assert rest.startswith(b"error: stopped by SIG") or signum == signal.SIGKILL
    return process.returncode


def test_ctrl_c_ends_with_130_and_a_closed_record(tmp_path: Path) -> None:
    assert stop(tmp_path, signal.SIGINT) == 130
    assert outcome(os.environ["FERRY_HOME"])["status"] == "interrupted"


def test_sigterm_ends_with_143_and_a_closed_record(tmp_path: Path) -> None:
    assert stop(tmp_path, signal.SIGTERM) == 143
    assert outcome(os.environ["FERRY_HOME"])["status"] == "interrupted"


def test_a_killed_run_is_listed_as_killed_with_its_events(tmp_path: Path) -> None:
    assert stop(tmp_path, signal.SIGKILL) == -signal.SIGKILL
    (run,) = json.loads(ferry("runs", "--json").stdout)["runs"]
    assert (run["status"], run["verb"]) == ("killed", "strange")
    shown = json.loads(ferry("runs", "show", "latest", "--json").stdout)
    assert [event["event"] for event in shown["events"]] == ["waiting"]
