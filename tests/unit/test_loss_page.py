"""The loss page and the comparison of two training runs: all is in one file, and nothing in it is made up."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import ferry
from ferry.control.runs.report import report
from ferry.core.errors import ConfigError, FerryError, InputError, OutputError
from ferry.core.metrics import MetricsWriter, StepMetrics, ValidationPoint, smooth
from ferry.core.record import open_record
from ferry.core.verb import Result
from ferry.pages.curves import RunCurves, marks_of, read_run
from ferry.pages.loss import MAX_STEPS, render_page

SCRIPT = Path(ferry.__file__).parent / "pages" / "loss.js"
VOID = {"meta", "input", "br"}


def step(number: int, loss: float = 0.0, generation: int = 0) -> StepMetrics:
    return StepMetrics(
        step=number, loss=loss or 1 + 1 / number, lr=1e-4, grad_norm=1.0, num_tokens=900, num_supervised=400,
        num_padding=100, num_samples=8, step_s=2.0, cpu_s=3.0, tokens_per_s=450.0, tokens_per_s_per_device=512.0,
        mfu=None, peak_memory_bytes=10**9, epoch=0.0, ts=1000.0 + number, generation=generation,
    )  # fmt: skip


def curves(name: str = "one", num_steps: int = 10, **fields: object) -> RunCurves:
    return replace(RunCurves(name, [step(number) for number in range(1, num_steps + 1)]), **fields)


def run_directory(path: Path, losses: list[float], **config: object) -> Path:
    path.mkdir()
    with MetricsWriter(path / "metrics.jsonl") as writer:
        for number, loss in enumerate(losses, start=1):
            writer.append(step(number, loss))
    (path / "run.json").write_text(json.dumps({"config": config, "samples": [[["ask", False], ["answer", True]]]}))
    return path


def runs(**fields: object) -> Result:
    verb = ferry.runs
    assert callable(verb)
    result: Result = verb(**fields)
    return result


class Reader(HTMLParser):
    """Reads a page as a browser without scripts does: all elements, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def count(self, tag: str, style: str) -> int:
        return sum(name == tag and style in str(attributes.get("class")).split() for name, attributes in self.elements)


def data_of(page: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(Reader(page).texts["script"][0])
    return found


def test_the_page_needs_nothing_from_outside() -> None:
    page = render_page([curves(), curves("two")], "Two")
    reader = Reader(page)
    assert not [attributes for _, attributes in reader.elements if {"src", "href"} & set(attributes)]
    assert not re.search(r"https?://|url\((?!#)|@import|fetch\(|XMLHttpRequest", page)


def test_without_a_script_the_loss_is_a_still_picture() -> None:
    run = curves(num_steps=50, validation=[ValidationPoint(25, 1.5, 100, 0.0)])
    reader = Reader(render_page([run], "One"))
    assert reader.count("path", "raw") == 1
    assert reader.count("circle", "dot") == 1
    assert reader.count("text", "tick") > 6


def test_a_loss_that_is_not_a_number_is_a_gap() -> None:
    metrics = [step(number, float("nan") if number == 5 else 2.0) for number in range(1, 10)]
    page = render_page([RunCurves("one", metrics)], "One")
    assert Reader(page).count("path", "raw") == 2
    assert data_of(page)[0]["loss"] == [2.0] * 4 + [None] + [2.0] * 4


def test_names_and_texts_cannot_break_out_of_the_page() -> None:
    evil = "</script><script>alert(1)</script><b>&"
    run = curves(
        evil, samples=[[(evil, True)]], config={"model": evil},
        events=[{"event": "restart", "step": 3, "ts": 0, "reason": evil}],
    )  # fmt: skip
    reader = Reader(render_page([run], evil))
    assert sum(tag == "script" for tag, _ in reader.elements) == 2
    assert "".join(reader.texts["mark"]) == "marked" + evil


def test_only_the_supervised_part_of_a_sample_is_marked() -> None:
    run = curves(samples=[[("ask", False), ("answer", True)]] * 9)
    reader = Reader(render_page([run], "One"))
    assert reader.texts["mark"] == ["marked", "answer", "answer", "answer"]
    assert reader.texts["pre"] == ["ask", "ask", "ask"]


def test_samples_that_runs_share_are_shown_once() -> None:
    samples = [[("answer", True)]]
    page = render_page([curves("a", samples=samples), curves("b", samples=samples)], "Two")
    assert Reader(page).texts["mark"] == ["marked", "answer"]


def test_checkpoints_and_restarts_stand_at_their_steps() -> None:
    events = [
        {"event": "saved", "step": 4, "ts": 0},
        {"event": "restart", "ts": 1006.5, "reason": "rank 1 was killed"},
        {"event": "choice", "ts": 0},
    ]
    run = curves(events=events)
    assert [tuple(mark)[:3] for mark in marks_of(run)] == [(4, "saved", ""), (6, "restart", "rank 1 was killed")]
    reader = Reader(render_page([run], "One"))
    assert (reader.count("line", "saved"), reader.count("line", "restart")) == (1, 1)


def test_a_hang_shows_where_the_rank_was_stuck() -> None:
    stacks = {
        "0": {"state": "S", "waits_in": "", "stack": "elsewhere"},
        "1": {"state": "S", "waits_in": "", "stack": "in <all_reduce>"},
    }
    hang = {"event": "hang", "step": 3, "rank": 1, "phase": "training", "silence_s": 11.5, "stacks": stacks, "ts": 0}
    page = render_page([curves(events=[hang])], "One")
    assert "rank 1 was silent for 11.5 s (training)" in page
    assert "in &lt;all_reduce&gt;" in page
    assert "elsewhere" not in page


def test_a_restart_without_an_event_is_seen_in_the_metrics() -> None:
    metrics = [step(number, generation=int(number > 3)) for number in range(1, 7)]
    assert [mark.step for mark in marks_of(RunCurves("one", metrics))] == [4]


def test_a_long_run_is_thinned_and_keeps_its_peaks_and_its_ends() -> None:
    num_steps = 3 * MAX_STEPS
    losses = {12_345: 9.0, 23_457: 0.5}
    metrics = [step(number, losses.get(number, 2.0)) for number in range(1, num_steps)]
    (data,) = data_of(render_page([RunCurves("long", metrics)], "Long"))
    steps = data["step"]
    assert isinstance(steps, list)
    assert len(steps) <= MAX_STEPS + 2
    assert {1, 12_345, 23_457, num_steps - 1} <= set(steps)


def test_several_runs_have_a_legend_and_the_settings_that_differ() -> None:
    first, second = curves("a", config={"lr": 1e-4, "tp": 1}), curves("b", config={"lr": 2e-4, "tp": 1})
    page = render_page([first, second], "Two")
    assert Reader(page).count("label", "key") == 2
    different = page.partition("Settings that differ")[2].partition("Settings in common")[0]
    assert re.findall(r"<td>(.*?)</td>", different) == ["0.0001", "0.0002"]


def test_of_paths_on_this_machine_only_the_name_is_shown() -> None:
    page = render_page([curves(config={"model": "/home/me/models/small", "data": ["/home/me/d.json"]})], "One")
    assert "…/small" in page
    assert "/home/me" not in page


def test_a_run_that_has_measured_nothing_yet_has_a_page() -> None:
    assert "no step has been measured yet" in render_page([RunCurves("new", [])], "New")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the page's script")
def test_the_script_smooths_as_the_library_does_and_keeps_peaks() -> None:
    values = [3.0, 1.0, float("nan"), 2.0, 8.0]
    program = (
        "const vm = require('vm'), fs = require('fs');"
        f"vm.runInThisContext(fs.readFileSync({json.dumps(str(SCRIPT))}, 'utf8'));"
        "const points = Array.from({length: 1000}, (_, i) => [i, i === 777 ? 9 : 1]);"
        "console.log(JSON.stringify([smooth([3, 1, null, 2, 8], 0.7), thin(points, 50).some((p) => p[1] === 9)]))"
    )
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    smoothed, has_peak = json.loads(done.stdout)
    assert smoothed == pytest.approx(smooth(values, 0.7))
    assert has_peak


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.jsonl") as caught:
        read_run(tmp_path)
    assert caught.value.code == "metrics.no-run"


def test_two_run_directories_are_compared_and_overlaid(tmp_path: Path) -> None:
    first = run_directory(tmp_path / "a", [3.0, 2.0, 1.5], lr=1e-4, tp=1)
    second = run_directory(tmp_path / "b", [3.0, 2.25, 1.5, 1.25], lr=1e-4, tp=2)
    page = tmp_path / "page.html"
    result = runs(action="compare", ids=(str(first), str(second)), page=page)
    assert result["differences"]["config"] == [["tp", 1, 2]]
    assert result["curves"] == {
        "steps": [3, 4],
        "first_loss": [3.0, 3.0],
        "last_loss": [1.5, 1.25],
        "min_loss": [1.5, 1.25],
        "median_tokens_per_s": [450.0, 450.0],
        "num_common_steps": 3,
        "num_not_compared": 0,
        "max_loss_difference": 0.25,
        "max_loss_difference_step": 2,
    }
    assert "largest loss difference: 0.25 at step 2, of 3 compared" in report(result)
    assert [run["name"] for run in data_of(page.read_text())] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "page.html"]


def test_steps_that_are_not_numbers_are_counted_and_not_called_equal(tmp_path: Path) -> None:
    first = run_directory(tmp_path / "a", [3.0, 2.0])
    second = run_directory(tmp_path / "b", [3.0, float("nan")])
    text = report(runs(action="compare", ids=(str(first), str(second))))
    assert "not a number in one or both: 1 of 2 common steps" in text
    assert "the losses of 1 steps are equal, bit for bit" in text


def test_records_of_training_runs_are_compared_by_their_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = []
    for name, losses in (("a", [3.0, 2.0]), ("b", [3.0, 2.0])):
        run_directory(tmp_path / name, losses)
        record = open_record("train", {"output": name}, {}, {}, lambda text: None)
        assert record is not None
        record.close("ok")
        ids.append(record.id)
    monkeypatch.chdir("/")
    result = runs(action="compare", ids=tuple(ids))
    assert result["curves"]["max_loss_difference"] == 0
    assert "the losses of 2 steps are equal, bit for bit" in report(result)


def test_one_run_has_a_page_too(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "a", [3.0, 2.0], method="lora")
    result = runs(action="show", ids=(str(directory),), page=tmp_path / "page.html")
    assert f"page  {tmp_path / 'page.html'}" in report(result)
    assert "lora" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"action": "list"}, ConfigError, "--page belongs to"),
        ({"action": "compare", "ids": ("A", "RECORD")}, InputError, "no metrics of a training run"),
        ({"action": "show", "ids": ("A",), "page": "nowhere/page.html"}, OutputError, "its directory does not exist"),
    ],
)
def test_a_page_that_cannot_be_made_is_refused(
    tmp_path: Path, fields: dict[str, object], error: type[FerryError], told: str
) -> None:
    record = open_record("convert", {"output": "x"}, {}, {}, lambda text: None)
    assert record is not None
    record.close("ok")
    names = {"A": str(run_directory(tmp_path / "a", [1.0])), "RECORD": record.id}
    ids = fields.get("ids", ())
    assert isinstance(ids, tuple)
    page = tmp_path / str(fields.get("page", "page.html"))
    with pytest.raises(error, match=told):
        runs(**{**fields, "ids": tuple(names[name] for name in ids), "page": page})
    assert not list(tmp_path.glob("*.html"))


def test_tensorboard_event_files_hold_the_numbers(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    from ferry.pages.tensorboard import TensorBoardWriter

    with TensorBoardWriter(tmp_path) as writer:
        writer.append(step(1, 2.5))
        writer.append(replace(step(2, 1.5), grad_norm=float("nan")))
        writer.append(ValidationPoint(2, 1.75, 100, 2000.0))
    (path,) = tmp_path.iterdir()
    data, found, place = path.read_bytes(), {}, 0
    while place < len(data):  # each record: length, its CRC, the event, its CRC
        (size,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        place += size + 16
    assert (found["train/loss", 1], found["train/loss", 2], found["train/validation_loss", 2]) == (2.5, 1.5, 1.75)
    assert ("train/grad_norm", 2) not in found
    assert ("train/mfu", 1) not in found
