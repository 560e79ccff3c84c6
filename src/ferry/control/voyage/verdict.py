"""The one sentence that a voyage ends with."""

from __future__ import annotations

from typing import NamedTuple

from ferry.control.voyage.artifacts import artifacts_of, num_equal_tensors
from ferry.control.voyage.journey import Journey
from ferry.core.errors import FerryError


class Verdict(NamedTuple):
    """`mood` is good, plain or bad; `text` is the sentence, `detail` the one after it."""

    mood: str
    text: str
    detail: str


def verdict_of(journey: Journey, error: Exception | None) -> Verdict:
    """Return what became of the voyage; "nothing was lost" is only said of artifacts that declare no change."""
    steps, entries = journey.voyage.steps, journey.entries
    if error is not None:
        return Verdict("bad", "The voyage stopped", error.message if isinstance(error, FerryError) else str(error))
    gates = f"{len(journey.gates)} of {len(journey.voyage.gates)} gates hold" if journey.voyage.gates else ""
    waiting = [step.name for step in steps if step.name not in entries]
    if waiting:
        return Verdict("plain", f"{len(entries)} of {len(steps)} steps are done", f"not made yet: {', '.join(waiting)}")
    everything = artifacts_of(entries.values(), journey.voyage.output)
    artifacts = [artifact for artifact in everything if not artifact.is_changed]
    fingerprints = {artifact.manifest.model_sha256 for artifact in artifacts}
    if len(artifacts) > 1 and len(fingerprints) == 1 and "" not in fingerprints:
        equal, total = num_equal_tensors(artifacts)
        num_changed = len(everything) - len(artifacts)
        made = f"{num_changed} artifacts are declared changes of it" if num_changed else ""
        detail = "; ".join(text for text in (gates, made) if text)
        return Verdict("good", f"Nothing was lost: {equal} of {total} tensors bit for bit", detail)
    return Verdict("good", f"Done: {len(steps)} steps", gates)
