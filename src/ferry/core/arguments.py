"""The words of a command line, read against a verb's options.

Every field is `--foo-bar VALUE` or `--foo-bar=VALUE`; booleans are `--foo` and `--no-foo`; lists are `4,4,4` or the
flag repeated. A positional field may be given by place or by flag. `--foo_bar` is `--foo-bar`. A verb's own short flag
wins over one that all verbs have. Abbreviated flags are refused: they would break when a flag is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ferry.core.config import Layer, Problem
from ferry.core.errors import did_you_mean
from ferry.core.options import Option
from ferry.core.sources import from_text

GLOBAL_SWITCHES = {"--json": "json", "--quiet": "quiet", "-q": "quiet", "--dry-run": "dry_run"}
GLOBAL_VALUES = {"--config": "files", "--set": "assignments"}


class Arguments(NamedTuple):
    """A command line, read: the layer of flags, and the flags that every verb has."""

    layer: Layer
    switches: frozenset[str]
    files: tuple[str, ...]
    assignments: tuple[str, ...]


class _Words:
    """The state of reading one command line."""

    def __init__(self, options: Sequence[Option]) -> None:
        self.options = options
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []

    def put(self, option: Option, value: Any, origin: str) -> None:
        """Store a value; a list grows, anything else must not be given twice with different values."""
        old = self.values.get(option.name)
        if option.name in self.values and isinstance(old, list) and isinstance(value, list):
            value = old + value
        elif option.name in self.values and old != value:
            first = self.origins[option.name]
            self.problems.append(
                Problem("config.conflict", f"{option.name} is given twice: {old} by {first}, {value} by {origin}")
            )
        self.values[option.name] = value
        self.origins[option.name] = origin


def read_arguments(words: Sequence[str], options: Sequence[Option], passthrough: str = "") -> Arguments:
    """Read the words after the verb. `passthrough` names the list field that takes every word unknown here."""
    state = _Words(options)
    named = _by_flag(options)
    collected: dict[str, list[str]] = {"files": [], "assignments": []}
    switches: set[str] = set()
    places: list[str] = []
    passed: list[str] = []
    num_places = sum(option.positional for option in options)
    queue = list(words)
    while queue:
        word = queue.pop(0)
        flag, sign, text = word.partition("=")
        flag = _spelling(flag, named)
        if word == "--":
            places += queue
            break
        is_for_another = bool(passthrough) and len(places) == num_places and not word.startswith("--")
        if word in GLOBAL_SWITCHES and flag not in named and not is_for_another:
            switches.add(GLOBAL_SWITCHES[word])
        elif flag in GLOBAL_VALUES and not passthrough:
            if sign or queue:
                collected[GLOBAL_VALUES[flag]].append(text if sign else queue.pop(0))
            else:
                state.problems.append(Problem("config.syntax", f"{flag} needs a value"))
        elif flag in named:
            _read_flag(state, named[flag], flag, text if sign else None, queue, named)
        elif passthrough and (len(places) == num_places or word.startswith("-")):
            passed.append(word)
        elif word.startswith("-") and len(word) > 1:
            near = did_you_mean(flag, [*named, *GLOBAL_SWITCHES, *GLOBAL_VALUES, "--help"])
            state.problems.append(Problem("config.unknown", f"unknown flag {flag}{near}"))
            if not sign and queue and not queue[0].startswith("-"):
                queue.pop(0)  # most likely its value: naming that too would only confuse
        else:
            places.append(word)
    _place(state, places)
    if passed:
        state.values[passthrough] = passed
    layer = Layer("flag", state.values, state.origins, tuple(state.problems))
    return Arguments(layer, frozenset(switches), tuple(collected["files"]), tuple(collected["assignments"]))


def _by_flag(options: Sequence[Option]) -> dict[str, list[tuple[Option, bool]]]:
    """Return for each spelling the options it fills, and whether it says yes (only `--no-x` says no)."""
    named: dict[str, list[tuple[Option, bool]]] = {}
    for option in options:
        for flag in (*option.flags, option.short):
            if flag:
                named.setdefault(flag, []).append((option, True))
            if flag.startswith("--") and option.kind == "bool":
                named.setdefault(f"--no-{flag[2:]}", []).append((option, False))
    return named


def _spelling(flag: str, named: dict[str, list[tuple[Option, bool]]]) -> str:
    """Return a flag as the verb spells it: other programs have underscores where it has dashes."""
    dashed = flag.replace("_", "-")
    return dashed if flag.startswith("--") and dashed in named else flag


def _read_flag(
    state: _Words,
    targets: Sequence[tuple[Option, bool]],
    flag: str,
    text: str | None,
    queue: list[str],
    named: dict[str, list[tuple[Option, bool]]],
) -> None:
    """Read one flag and, if it needs one, its value from the queue."""
    if targets[0][0].kind == "bool":
        for option, yes in targets:
            if text is not None and not yes:
                state.problems.append(Problem("config.syntax", f"{flag} takes no value"))
            state.put(option, yes if text is None else text, f"flag {flag}")
        return
    if text is None:
        following = _spelling(queue[0].partition("=")[0], named) if queue else "--"
        if following in named or following in GLOBAL_SWITCHES or following.startswith("--"):
            state.problems.append(Problem("config.syntax", f"{flag} needs a value"))
            return
        text = queue.pop(0)
    for option, _ in targets:
        state.put(option, from_text(option, text), f"flag {flag}")


def _place(state: _Words, places: list[str]) -> None:
    """Give words without a flag to the positional fields, in order; the last one, if a list, takes all that is left.

    A choice with a default may be left out: it is skipped when its word is none of its choices and the other
    positional fields have room for all words.
    """
    waiting = [option for option in state.options if option.positional]
    queue = list(places)
    while queue and waiting:
        option = waiting.pop(0)
        if option.choices and not option.required and queue[0] not in option.choices and len(queue) <= len(waiting):
            continue
        if option.kind == "list" and not waiting:
            state.put(option, queue[:], "argument")
            return
        state.put(option, from_text(option, queue.pop(0)), "argument")
    state.problems += [Problem("config.unknown", f"unexpected argument {word!r}") for word in queue]
