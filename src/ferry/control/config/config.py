"""What `ferry config` can be asked."""

from __future__ import annotations

from typing import Literal

from ferry.core.config import VerbConfig, option


class ConfigConfig(VerbConfig):
    """Show a verb's values and where each comes from, or the schema of its config.

    `ferry config show convert --origin --tp 2`: every word after the verb is read as that verb would read it.
    `ferry config schema convert` prints a JSON schema, for editors and forms.
    """

    action: Literal["show", "schema"] = option(..., help="What to do.", positional=True)
    verb: str = option(..., help="The verb whose config is meant.", positional=True)
    origin: bool = option(False, help="Say where each value came from.")
    arguments: tuple[str, ...] = option((), help="Arguments and flags of the verb, as they are given to it.")

    @classmethod
    def passthrough(cls) -> str:
        return "arguments"
