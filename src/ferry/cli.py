"""The first words of a command line: which verb, or one of the pages that need no verb.

`ferry --help` and `ferry --version` are answered here with nothing imported but the table of verbs, so that they are
instant. Everything else is handed to `ferry.command`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferry.core.verb import Verb

SWITCHES_BEFORE_A_VERB = ("--json", "--quiet", "-q", "--dry-run")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    arguments = list(sys.argv[1:] if words is None else words)
    switches: list[str] = []
    while arguments and arguments[0] in SWITCHES_BEFORE_A_VERB:
        # After the verb its own `-q` may mean something else.
        word = arguments.pop(0)
        switches.append("--quiet" if word == "-q" else word)
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h", "help") and len(arguments) <= 1:
        return _say(overview())
    if first == "--version":
        from ferry import __version__

        return _say(f"ferry {__version__}\n")
    if first == "help":
        arguments = [arguments[1], "--help"]
    from ferry.command import execute

    return execute(arguments[0], [*switches, *arguments[1:]])


def overview() -> str:
    """Return the page of `ferry --help`."""
    from ferry.core.verb import discover

    verbs = list(discover().values())
    width = max((len(verb.name) for verb in verbs), default=0)
    return _OVERVIEW.format(verbs="\n".join(_row(verb, width) for verb in verbs))


def _row(verb: Verb, width: int) -> str:
    return f"  {verb.name:{width}}  {verb.summary}"


def _say(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone. Without this, Python would complain once more while closing stdout.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


_OVERVIEW = """\
ferry carries a Hugging Face language model to the hardware you have, and proves that nothing was lost on the way.

usage: ferry VERB [arguments] [flags]

verbs:
{verbs}

flags of every verb:
  --help, -h       what the verb does, and all its flags
  --json           one JSON document on stdout, for errors too
  --dry-run        print the plan and write nothing (verbs that write)
  --config FILE    read values from a YAML file; may be repeated, later files win
  --set KEY=VALUE  set one value, also a nested one: --set a.b=c
  --quiet, -q      no progress (where a verb has its own -q, as serve has: --quiet)

Values come from: defaults, config files, environment (FERRY_<VERB>_<FIELD>), flags; later ones win.
`ferry config show VERB --origin` tells where each came from.
"""
