"""What was met on the way from rows to tokens, and when it is too much to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ferry.core.errors import GateError, InputError
from ferry.data.chunks import Done, Finding
from ferry.data.settings import DataSettings

NUM_BAD_SHOWN = 10


@dataclass
class Tally:
    """Counts, and the first bad rows by name."""

    num_rows: int = 0
    num_bad: int = 0
    bad: list[Finding] = field(default_factory=list)
    num_too_long: int = 0
    longest: str = ""
    """Where the longest of them is."""
    longest_tokens: int = 0
    num_without_target: int = 0

    def add(self, done: Done) -> None:
        self.num_rows += done.num_rows
        self.num_bad += len(done.bad)
        self.bad += done.bad[: NUM_BAD_SHOWN - len(self.bad)]
        self.num_too_long += len(done.too_long)
        for num_tokens, where in done.too_long:
            if num_tokens > self.longest_tokens:
                self.longest_tokens, self.longest = num_tokens, where
        self.num_without_target += done.num_without_target

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "bad": [list(finding) for finding in self.bad]}


def tally_from_json(document: dict[str, Any]) -> Tally:
    bad = [Finding(*finding) for finding in document["bad"]]
    return Tally(**{**document, "bad": bad})


def judge_bad(tally: Tally, num_rows: int, settings: DataSettings) -> None:
    """Refuse more bad rows than allowed among `num_rows`, naming the first ones."""
    if tally.num_bad > settings.max_bad_fraction * num_rows:
        named = "; ".join(f"{finding.where} {finding.what}" for finding in tally.bad)
        more = f"; and {tally.num_bad - len(tally.bad)} more" if tally.num_bad > len(tally.bad) else ""
        raise GateError(
            f"{tally.num_bad} or more of {num_rows} rows are bad, at most {settings.max_bad_fraction:.2%} may be: "
            f"{named}{more}",
            code="data.bad-rows",
            repair="correct them, or raise max_bad_fraction to leave them out",
        )


def judge(tally: Tally, num_samples: int, path: Path, settings: DataSettings) -> None:
    """Refuse samples that are too long if they may not be cut or left out, and data that leaves nothing."""
    if tally.num_too_long and settings.truncation == "refuse":
        raise GateError(
            f"{tally.num_too_long} of {tally.num_rows} samples are longer than seq_len={settings.seq_len}; "
            f"the longest, {tally.longest}, has {tally.longest_tokens} tokens",
            code="data.too-long",
            repair=f"use seq_len={tally.longest_tokens}, or truncation=cut or truncation=drop",
        )
    if not num_samples:
        raise InputError(
            f"{path} leaves nothing to train on: {tally.num_rows} rows, {tally.num_bad} bad, {tally.num_too_long} too "
            f"long, {tally.num_without_target} with nothing to learn",
            code="data.empty",
            repair="give other data, or a larger seq_len",
        )
