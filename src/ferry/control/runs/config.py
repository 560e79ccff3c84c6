"""What `ferry runs` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ferry.core.config import VerbConfig, option

NUM_IDS = {"list": 0, "show": 1, "compare": 2}


class RunsConfig(VerbConfig):
    """List, show and compare the records of runs.

    `ferry runs`, `ferry runs show latest`, `ferry runs compare A B`. An id may be shortened as long as it is
    unambiguous; its last six letters are enough; `latest` is the newest run. In place of an id stands also the
    directory that a training run made.
    """

    action: Literal["list", "show", "compare"] = option("list", help="What to do.", positional=True)
    ids: tuple[str, ...] = option((), help="The runs to show (one) or to compare (two).", positional=True, metavar="ID")
    verb: str = option("", help="List only runs of this verb.")
    status: Literal["", "ok", "failed", "interrupted", "running", "killed"] = option(
        "", help="List only runs that ended so.", metavar="STATUS"
    )
    limit: int = option(20, ge=1, help="List at most so many, the newest first.", unit="runs")

    page: Path | None = option(None, help="Write the loss page of these training runs to this file.", metavar="FILE")

    @model_validator(mode="after")
    def _ids_fit_the_action(self) -> RunsConfig:
        wanted = NUM_IDS[self.action]
        if len(self.ids) != wanted:
            raise ValueError(f"ferry runs {self.action} takes {wanted} run ids, found {len(self.ids)}")
        if self.page is not None and self.action == "list":
            raise ValueError("--page belongs to ferry runs show and ferry runs compare")
        return self
