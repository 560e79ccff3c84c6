"""How a module is started in an interpreter of its own: never with code of the working directory.

`python -m` looks for every module in the working directory first, and that may be the directory of a model from the
network: a file `llguidance.py` in it would be run.
"""

from __future__ import annotations

import sys

ANY_PYTHON = (
    "import sys; sys.path = [place for place in sys.path if place]; del sys.argv[0]; import runpy; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
"""Runs the module that is named by the first word. Python has the flag `-P` since 3.11 only."""
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Environment variables that say the same as `-P`, to what an interpreter starts in its turn too."""


def module_words(module: str, *flags: str) -> list[str]:
    """Return the words that run a module with this interpreter; what follows them are the module's arguments."""
    if sys.version_info >= (3, 11):
        return [sys.executable, *flags, "-P", "-m", module]
    return [sys.executable, *flags, *foreign_module_words(module)]


def foreign_module_words(module: str) -> list[str]:
    """Return the words that run a module, to follow the name of an interpreter of any release."""
    return ["-c", ANY_PYTHON, module]
