"""The report of a voyage: one HTML file that needs no network and no script, for screens light and dark and for paper.

Every result is shown, whatever verb it came from. A few keys that any verb may use are shown better: `artifact`,
`model_sha256`, `bytes`, `question` with `answer`, `verified`, `same`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from ferry import __version__
from ferry.control.voyage import picture
from ferry.control.voyage.artifacts import Artifact, artifacts_of
from ferry.control.voyage.journey import Journey
from ferry.control.voyage.quantization import quantizations_of
from ferry.control.voyage.training import trainings_of
from ferry.control.voyage.verdict import verdict_of
from ferry.core.environment import environment
from ferry.core.units import duration_text, size_text

MAX_TENSORS = 2000
MAX_TEXT = 2000
"""Characters of a long structure: the proof of a quantized model tells of thousands of layers."""
WORDS = {"done": "done", "skipped": "skipped: unchanged", "kept": "kept", "failed": "failed", "waiting": "not made"}


def render(journey: Journey, error: Exception | None) -> str:
    """Return the whole page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("ferry.control.voyage", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = _shortener(journey)
    templates.filters |= {"size": size_text, "duration": duration_text, "shown": shown}
    voyage, entries = journey.voyage, list(journey.entries.values())
    artifacts = artifacts_of(entries, voyage.output)
    return templates.get_template("page.html.j2").render(
        voyage=voyage,
        verdict=verdict_of(journey, error),
        picture=picture.picture_of(artifacts, entries),
        card_width=picture.CARD_WIDTH,
        card_height=picture.CARD_HEIGHT,
        note_height=picture.NOTE_HEIGHT,
        steps=[_row(journey, step.name, step.kind) for step in voyage.steps],
        total_s=sum(entry["seconds"] for entry in entries),
        gates=_gate_rows(journey),
        artifacts=artifacts,
        original=artifacts[0].manifest.model_sha256 if artifacts else "",
        tensors=_tensor_rows(artifacts),
        max_tensors=MAX_TENSORS,
        checks=[entry for entry in entries if "verified" in entry["result"] or "same" in entry["result"]],
        talks=_talks(entries),
        trainings=trainings_of(entries),
        quantizations=quantizations_of(entries, voyage.output),
        details=[_details(entry, shown) for entry in entries],
        environment=_environment(),
        version=__version__,
        now=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    )


def _shortener(journey: Journey) -> Callable[[object], str]:
    """Return a function that takes this machine's paths out of a text: a report is made to be handed on."""
    voyage = journey.voyage
    short = {
        str(voyage.output): voyage.output.name,
        str(voyage.file.parent): voyage.file.parent.name,
        sys.executable: "python",
    }

    def shown(value: object) -> str:
        text = str(value)
        for path, name in sorted(short.items(), key=lambda item: -len(item[0])):
            text = text.replace(path, name)
        return text

    return shown


def _row(journey: Journey, name: str, kind: str) -> dict[str, Any]:
    """Return a row of the table of steps."""
    entry = journey.entries.get(name)
    if entry is None:
        return {"name": name, "kind": kind, "status": "waiting", "word": WORDS["waiting"]}
    seconds, size = entry["seconds"], entry["bytes"]
    return {
        **entry,
        "word": WORDS[entry["status"]],
        "rate": f"{size_text(size / seconds)}/s" if size and seconds >= 0.05 else "",
    }


def _gate_rows(journey: Journey) -> list[dict[str, Any]]:
    """Return every gate, judged or not, in the order of the steps."""
    order = [step.name for step in journey.voyage.steps]
    judged = {(gate["gate"], gate["after"]): gate for gate in journey.gates}
    rows = []
    for gate in sorted(journey.voyage.gates, key=lambda gate: order.index(gate.after)):
        found = judged.get((gate.text, gate.after), {"holds": None, "values": {}})
        rows.append({"text": gate.text, "after": gate.after, **found})
    return rows


def _talks(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each question with all its answers, and what is equal among them."""
    talks: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if isinstance(entry["result"].get("question"), str) and isinstance(entry["result"].get("answer"), str):
            talks.setdefault(entry["result"]["question"], []).append(entry)
    return [
        {
            "question": question,
            "entries": asked,
            "same_answer": _all_equal(asked, "answer"),
            "same_logits": _all_equal(asked, "logits_sha256"),
        }
        for question, asked in talks.items()
    ]


def _all_equal(entries: list[dict[str, Any]], key: str) -> bool:
    values = {entry["result"].get(key) for entry in entries}
    return len(entries) > 1 and len(values) == 1 and None not in values


def _tensor_rows(artifacts: list[Artifact]) -> list[dict[str, Any]]:
    """Return every tensor with its digest, and in how many artifacts it has this digest."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for artifact in artifacts:
        for name, tensor in artifact.manifest.tensors.items():
            row = rows.setdefault((name, tensor.sha256), {"name": name, "tensor": tensor, "held": 0})
            row["held"] += 1
    return sorted(rows.values(), key=lambda row: row["held"] == len(artifacts))


def _details(entry: Mapping[str, Any], shown: Callable[[object], str]) -> dict[str, Any]:
    told = {key: value for key, value in entry["told"].items() if value not in (None, "", [], {})}
    return {**entry, "told_rows": _flat(told, shown), "result_rows": _flat(entry["result"], shown)}


def _flat(values: Mapping[str, Any], shown: Callable[[object], str], prefix: str = "") -> list[tuple[str, str]]:
    """Return names and texts of all scalar values, nested ones with dotted names; long structures as JSON."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, shown, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list) for item in value):
            text = shown(json.dumps(value, ensure_ascii=False))
            rows.append((name, text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text):,} characters)"))
        elif isinstance(value, list | tuple):
            rows.append((name, shown(", ".join(map(str, value)))))
        else:
            rows.append((name, _scalar(key, value, shown)))
    return rows


def _scalar(key: str, value: object, shown: Callable[[object], str]) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no"}.get(bool(value), "") if value is not None else "–"
    if isinstance(value, int) and (key == "bytes" or key.endswith("_bytes")):
        return f"{size_text(value)} ({value:,})"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else shown(value)


def _environment() -> list[tuple[str, str]]:
    found = environment()
    rows = [(name, str(found[name])) for name in ("ferry", "python", "platform", "cpu")]
    rows.append(("cores", str(found["num_cores"])))
    rows.append(("memory", size_text(found["memory_bytes"])))
    return [*rows, *((name, str(version)) for name, version in found["packages"].items())]
