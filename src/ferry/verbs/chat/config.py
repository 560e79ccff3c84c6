"""The options of `ferry chat`."""

from __future__ import annotations

from pathlib import Path

from ferry.core.config import VerbConfig, option
from ferry.core.shell_words import ShellWords

SETTINGS = ("temperature", "top_p", "top_k", "max_tokens", "seed")
"""Fields of a request that a user sets, by the names they have there."""
USUAL_MAX_TOKENS = 1024
"""The longest answer where nobody says: a small model may otherwise go on to the end of its context, for minutes."""


class ChatConfig(VerbConfig):
    """Talk to a model in the terminal, or ask it one thing.

    `ferry chat MODEL` starts `ferry serve` for a model directory and ends it afterwards. `ferry chat URL` talks to any
    server with the OpenAI API. With `--prompt`, or text on stdin, it answers once; with `--schema` its exit status is 8
    if the answer does not keep the schema.
    """

    target: str = option(
        ..., positional=True, min_length=1, metavar="MODEL|URL", help="Model directory, or address of a running server."
    )
    prompt: str | None = option(None, help="Answer this and leave. Default: stdin if it is piped, else a conversation.")
    system: str = option("", help="System prompt.")
    schema_file: Path | None = option(
        None, aliases=("--schema",), metavar="FILE", help="JSON schema that every answer must keep."
    )
    temperature: float | None = option(None, ge=0, le=2, help="0 takes the likeliest token; default: the model's.")
    top_p: float | None = option(None, gt=0, le=1, help="Share of probability to choose from; default: the model's.")
    top_k: int | None = option(None, ge=0, help="Tokens to choose from, 0: all; default: the model's.")
    max_tokens: int | None = option(
        None, ge=1, unit="tokens", help=f"Longest answer; default: {USUAL_MAX_TOKENS}, or what fits if that is less."
    )
    seed: int | None = option(None, ge=0, help="With a seed the same question gets the same answer.")
    model: str = option("", help="Name of the model on a server that has several; default: its first.")
    api_key_file: Path | None = option(None, help="File whose first line is the key of the server.")
    serve_args: ShellWords = option(
        "", metavar="'WORDS'", help="Further words for the server of MODEL, as --serve-args='--engine llamacpp'."
    )

    @property
    def sampling(self) -> dict[str, float]:
        """The fields of a request that were set."""
        return {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
