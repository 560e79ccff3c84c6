"""Run records: what is kept, how it is found again, and that nothing about them can stop a verb."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import ferry
from ferry.core.environment import settings
from ferry.core.errors import ConfigError, InputError, LayoutError
from ferry.core.record import Record, open_record
from ferry.core.runs import all_runs, find_run, read_events
from ferry.core.verb import Result


def opened(verb: str = "convert", **config: object) -> Record:
    warnings: list[str] = []
    record = open_record(verb, config, dict.fromkeys(config, "flag"), {"plan": 1}, warnings.append)
    assert record is not None, warnings
    return record


def runs(**fields: object) -> Result:
    verb = ferry.runs
    assert callable(verb)
    result: Result = verb(**fields)
    return result


def test_a_record_holds_config_environment_events_timings_and_result() -> None:
    record = opened(tp=2)
    record.event("file", name="a", num_bytes=3)
    record.close("ok", result={"artifact": "x"})
    names = {path.name for path in record.path.iterdir()}
    assert names == {"config.json", "environment.json", "events.jsonl", "lock", "plan.json", "result.json"}
    run = find_run("latest")
    assert (run.id, run.verb, run.status, run.config["config"]) == (record.id, "convert", "ok", {"tp": 2})
    assert {"wall_s", "user_cpu_s", "system_cpu_s", "peak_rss_bytes"} < set(run.outcome)
    (event,) = read_events(run)
    assert (event["event"], event["name"], event["num_bytes"]) == ("file", "a", 3)


def test_a_failed_run_keeps_the_error_with_its_code_and_traceback() -> None:
    record = opened()
    try:
        raise LayoutError("tp=3 does not divide 8", code="layout.tp", repair="use 1, 2, 4 or 8")
    except LayoutError as error:
        record.close("failed", error=error)
    error_json = find_run(record.id).outcome["error"]
    assert (error_json["code"], error_json["exit_status"]) == ("layout.tp", 4)
    assert "test_records.py" in error_json["traceback"]


def test_a_run_that_goes_on_is_running() -> None:
    record = opened()
    assert find_run(record.id).status == "running"
    record.close("ok")
    assert find_run(record.id).status == "ok"


def test_a_torn_last_event_is_left_out_and_a_damaged_one_before_it_is_named() -> None:
    record = opened()
    record.event("whole")
    record.close("ok")
    run = find_run(record.id)
    with open(record.path / "events.jsonl", "a") as file:
        file.write('{"ts": 1, "eve')
    assert [event["event"] for event in read_events(run)] == ["whole"]
    with open(record.path / "events.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_events(run)


def test_events_of_many_threads_never_mix() -> None:
    record = opened()
    threads = [
        threading.Thread(target=lambda: [record.event("x", text="y" * 3000) for _ in range(50)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record.close("ok")
    assert len(read_events(find_run(record.id))) == 400


def test_an_id_may_be_shortened_until_it_is_ambiguous() -> None:
    first, second = opened(), opened()
    first.close("ok")
    second.close("ok")
    assert find_run(first.id[-6:]).id == find_run(first.id).id == first.id
    with pytest.raises(InputError, match="means 2 runs") as caught:
        find_run(first.id[:6])
    assert caught.value.code == "runs.ambiguous"
    with pytest.raises(InputError, match="no run 'nothing'"):
        find_run("nothing")


def test_runs_are_listed_newest_first_and_filtered() -> None:
    for verb, status in (("pull", "ok"), ("convert", "failed"), ("convert", "ok")):
        opened(verb).close(status)
    assert [run.verb for run in all_runs()] == ["convert", "convert", "pull"]
    assert [run["verb"] for run in runs(status="failed")["runs"]] == ["convert"]
    assert [run["verb"] for run in runs(verb="pull")["runs"]] == ["pull"]
    assert len(runs(limit=1)["runs"]) == 1


def test_compare_names_what_differs_and_nothing_else() -> None:
    first, second = opened(tp=1, pp=2), opened(tp=4, pp=2)
    first.close("ok", result={"files": 3, "layout": {"tp": 1, "ep": 1}})
    second.close("ok", result={"files": 3, "layout": {"tp": 4, "ep": 1}})
    differences = runs(action="compare", ids=(first.id, second.id))["differences"]
    assert differences["config"] == [["tp", 1, 4]]
    assert differences["result"] == [["layout.tp", 1, 4]]
    assert differences["environment"] == []


def test_a_wrong_number_of_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match="compare takes 2 run ids, found 1"):
        runs(action="compare", ids=("latest",))


def test_a_home_that_cannot_be_written_is_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("FERRY_HOME", str(tmp_path / "file"))
    warnings: list[str] = []
    assert open_record("pull", {}, {}, None, warnings.append) is None
    assert len(warnings) == 1
    assert "set FERRY_HOME" in warnings[0]


def test_a_record_that_vanishes_is_one_warning() -> None:
    warnings: list[str] = []
    record = open_record("pull", {}, {}, None, warnings.append)
    assert record is not None
    for path in record.path.iterdir():
        path.unlink()
    os.rmdir(record.path)
    record.event("x")
    record.close("ok")
    assert len(warnings) == 1


def test_secrets_are_never_written_down() -> None:
    kept = settings({"HF_TOKEN": "hf_abc", "HF_HOME": "/x", "EDITOR": "ed"})
    assert kept == {"HF_HOME": "/x", "HF_TOKEN": "(set, not recorded)"}
