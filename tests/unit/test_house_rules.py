"""The rules of docs/design/style.md that a program can check, checked on the source of Ferry."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "ferry"
FILES = [pytest.param(path, id=str(path.relative_to(SOURCE))) for path in sorted(SOURCE.rglob("*.py"))]
MAY_WRITE_TO_STDOUT = {"cli.py", "command.py"}
MODEL_NAME = re.compile(r"(llama|qwen|baichuan|chatglm|glm|mistral|mixtral|yi|deepseek)([\d._-].*)?", re.IGNORECASE)
FORMULAS = {"llama3"}
"""Words that look like models and are not: `llama3` is a rope scaling that many families use."""
ACCELERATOR = re.compile(r"\b(cuda|npu)\b")


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def lines(found: list[ast.AST]) -> list[int]:
    return [getattr(node, "lineno", 0) for node in found]


def texts(node: ast.AST) -> list[str]:
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


@pytest.mark.parametrize("path", FILES)
def test_no_file_is_two_ideas_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES)
def test_no_global_state(path: Path) -> None:
    assert lines([node for node in nodes(path) if isinstance(node, ast.Global)]) == []


@pytest.mark.parametrize("path", FILES)
def test_nothing_is_caught_and_forgotten(path: Path) -> None:
    def is_forgetful(handler: ast.ExceptHandler) -> bool:
        is_bare = handler.type is None
        is_silent = all(isinstance(statement, ast.Pass) for statement in handler.body)
        return is_bare or is_silent

    handlers = [node for node in nodes(path) if isinstance(node, ast.ExceptHandler)]
    assert lines([handler for handler in handlers if is_forgetful(handler)]) == []


@pytest.mark.parametrize("path", FILES)
def test_the_library_never_prints(path: Path) -> None:
    def speaks(node: ast.AST) -> bool:
        is_print = isinstance(node, ast.Name) and node.id == "print"
        is_stdout = isinstance(node, ast.Attribute) and node.attr == "stdout" and ast.unparse(node) == "sys.stdout"
        return is_print or is_stdout

    if path.name not in MAY_WRITE_TO_STDOUT or path.parent != SOURCE:
        assert lines([node for node in nodes(path) if speaks(node)]) == []


@pytest.mark.parametrize("path", FILES)
def test_no_code_asks_for_the_name_of_a_model_outside_families(path: Path) -> None:
    def asks(node: ast.AST) -> bool:
        is_question = isinstance(node, ast.Compare | ast.match_case)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_question = node.func.attr in ("startswith", "endswith")
        return is_question and any(MODEL_NAME.fullmatch(text) for text in texts(node) if text not in FORMULAS)

    if SOURCE / "families" not in path.parents:
        assert lines([node for node in nodes(path) if asks(node)]) == []


@pytest.mark.parametrize("path", FILES)
def test_no_code_names_an_accelerator_outside_devices_and_engines(path: Path) -> None:
    if not {SOURCE / "devices", SOURCE / "engines"} & set(path.parents):
        found = [node for node in nodes(path) if isinstance(node, ast.Constant)]
        assert lines([node for node in found if ACCELERATOR.search(str(node.value))]) == []


@pytest.mark.parametrize("path", FILES)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    is_one_row_of_a_table = path.name == "verb.py" and path.parent.parent.name in ("verbs", "control")
    assert not text or is_one_row_of_a_table or ast.get_docstring(ast.parse(text))
