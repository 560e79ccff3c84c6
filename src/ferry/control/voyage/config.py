"""The options of `ferry run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ferry.core.config import VerbConfig, option


class RunConfig(VerbConfig):
    """Make the steps of a voyage, one after the other; finished steps whose inputs have not changed are skipped."""

    file: Path = option(..., positional=True, help="The voyage: a YAML file with named steps and gates.")
    output: Path | None = option(
        None, short="-o", metavar="DIR", help="Directory for everything the voyage makes; by default the file says."
    )
    only: str = option("", metavar="STEP", help="Make this one step again, and no other.")
    from_step: str = option(
        "", aliases=("--from",), metavar="STEP", help="Make this step and all later ones again; keep the earlier ones."
    )
    variables: dict[str, Any] = option(
        {}, metavar="YAML", help="Values for the file's variables; one alone is --set variables.NAME=VALUE."
    )
