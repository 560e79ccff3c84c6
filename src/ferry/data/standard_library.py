"""The text there is on every machine: Python's own documentation, as documents in an order that mixes their subjects.

It is the language reference that `help()` shows, and the docstrings of common modules, read from their source files:
nothing is imported that could do anything. The same Python always gives the same text; another version has another one.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ferry.core.errors import UnavailableError

MODULES = (
    "argparse", "base64", "bisect", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime",
    "decimal", "difflib", "enum", "fractions", "functools", "gzip", "heapq", "hmac", "inspect", "ipaddress", "json",
    "locale", "logging", "mimetypes", "optparse", "os", "pathlib", "pickle", "pickletools", "pprint", "random",
    "sched", "shelve", "shutil", "smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "timeit", "tokenize", "traceback", "typing", "uuid", "weakref", "zipfile",
)  # fmt: skip
MIN_CHARS = 80


def documents() -> Iterator[tuple[str, str]]:
    """Give the documents with their names: topics of the language reference, modules with the docstrings in them."""
    folder = Path(sysconfig.get_path("stdlib"))
    named: dict[str, str | Path] = {f"topic {name}": text for name, text in _topics(folder).items()}
    named |= {f"module {name}": path for name in MODULES if (path := _source(folder, name)) is not None}
    told: set[str] = set()
    for name in sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest()):
        found = named[name]
        text = found.strip() if isinstance(found, str) else _docstrings(found)
        if len(text) >= MIN_CHARS and text not in told:  # one topic may have several names
            told.add(text)
            yield name, text


def _topics(folder: Path) -> dict[str, str]:
    path = folder / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise UnavailableError(
            f"this Python brings no documentation ({path} is not there)",
            code="data.no-documentation",
            repair="give a text with --data",
        )
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            return {str(name): str(text) for name, text in ast.literal_eval(value).items()}
    raise AssertionError(f"{path} assigns no dict")


def _source(folder: Path, name: str) -> Path | None:
    """Return the source file of a module. Some are a package in newer versions of Python."""
    return next((path for path in (folder / f"{name}.py", folder / name / "__init__.py") if path.is_file()), None)


def _docstrings(path: Path) -> str:
    """Return the docstrings of a module, its classes and functions, in the order of the file."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    texts = [ast.get_docstring(node) or "" for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0))]
    return "\n\n".join(text for text in texts if len(text) >= MIN_CHARS)
