"""The options of `ferry pull`."""

from __future__ import annotations

from pathlib import Path

from ferry.core.config import VerbConfig, option


class PullConfig(VerbConfig):
    source: str = option(
        ...,
        help="What to bring: a hub id (OWNER/NAME), a directory, a .gguf file, or a built-in name.",
        positional=True,
        min_length=1,
    )
    output: Path | None = option(
        None, help="The directory to make; by default one here, named after the source.", short="-o", metavar="DIR"
    )
    revision: str = option("main", help="The branch, tag or commit of a hub repository.", min_length=1)
    tokenizer: Path | None = option(
        None, help="A directory with the tokenizer to put beside a GGUF file's weights.", metavar="DIR"
    )
    overwrite: bool = option(False, help="Replace the output if it exists; it stays until the new one is complete.")
