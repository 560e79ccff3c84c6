"""What a verb is to the rest of Ferry, and how verbs are found.

A verb is a folder with a `verb.py` that holds one `VERB`. The folders `ferry/verbs/` and `ferry/control/` are scanned,
so a new verb is a new folder and no second edit. A `Verb` names its parts as `module:attribute` text: finding all verbs
imports nothing heavy, and each part is imported when it is needed.
"""

from __future__ import annotations

import os
from importlib import import_module

TYPE_CHECKING = False  # `typing` alone would cost `ferry --help` more than all the rest of it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from ferry.core.config import VerbConfig
    from ferry.core.plan import Plan
    from ferry.core.progress import Reporter

Result: TypeAlias = "dict[str, Any]"
"""What a verb returns: JSON values only. `artifact` is the path it wrote, if it wrote one."""


class Verb:
    """One verb of Ferry.

    `plan(config) -> Plan` says what would be done and refuses what cannot be done; it writes nothing. It is empty for
    verbs that only look: they have no `--dry-run` and open no run record.
    `run(config, reporter) -> Result` does it. `report(result) -> str` is the calm screen for people.
    `order` is the place in the list of `ferry --help`.
    `exit_status(result) -> int` is optional, for verbs whose result is a verdict.
    """

    __slots__ = ("config", "exit_status", "name", "order", "plan", "report", "run", "summary")

    def __init__(
        self,
        name: str,
        summary: str,
        config: str,
        run: str,
        report: str,
        plan: str = "",
        order: int = 100,
        exit_status: str = "",
    ) -> None:
        self.name = name
        self.summary = summary
        self.config = config
        self.run = run
        self.report = report
        self.plan = plan
        self.order = order
        self.exit_status = exit_status


def discover() -> dict[str, Verb]:
    """Return every verb by name, in the order of the help page."""
    package = os.path.dirname(os.path.dirname(__file__))
    verbs: list[Verb] = []
    for layer in ("verbs", "control"):
        folder = os.path.join(package, layer)
        for entry in sorted(os.listdir(folder)):
            if os.path.isfile(os.path.join(folder, entry, "verb.py")):
                verbs.append(import_module(f"ferry.{layer}.{entry}.verb").VERB)
    return {verb.name: verb for verb in sorted(verbs, key=lambda verb: (verb.order, verb.name))}


def load(reference: str) -> Any:
    """Return the object that `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def load_config(verb: Verb) -> type[VerbConfig]:
    return load(verb.config)  # type: ignore[no-any-return]


def load_plan(verb: Verb) -> Callable[[VerbConfig], Plan]:
    return load(verb.plan)  # type: ignore[no-any-return]


def load_run(verb: Verb) -> Callable[[VerbConfig, Reporter], Result]:
    return load(verb.run)  # type: ignore[no-any-return]


def python_function(verb: Verb) -> Callable[..., Result]:
    """Return the verb as a Python function of its config fields, with an optional `reporter`."""

    def call(*, reporter: Reporter | None = None, **fields: Any) -> Result:
        from ferry.core.config import Layer, resolve
        from ferry.core.progress import Reporter

        config = resolve(load_config(verb), [Layer("argument", fields)]).config
        return load_run(verb)(config, reporter or Reporter())

    call.__name__ = verb.name
    call.__doc__ = verb.summary
    return call
