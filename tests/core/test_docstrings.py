"""The docstrings name the thing they document, so that a reader needs no second look."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.source import parse_source

SILBO = Path(__file__).parents[2] / "silbo"
RIDDLES = frozenset({"What", "Whether", "How", "Where", "Who", "That", "Those", "Which"})
"""The first words of docstrings that describe a thing in place of naming it."""


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
CONSTANTS = ast.Assign | ast.AnnAssign


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The docstrings of modules, classes, functions and constants, each with its line."""
    for node in ast.walk(tree):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            before: ast.AST = node
            for statement in block if isinstance(block, list) else ():
                is_documented = isinstance(before, CONSTANTS) or (before is node and isinstance(node, DOCUMENTED))
                match statement:
                    case ast.Expr(ast.Constant(str(text))) if is_documented and text.strip():
                        yield statement.lineno, text.strip()
                before = statement


def test_the_docstrings_of_every_place_are_found() -> None:
    code = '"""m"""\nX = 1\n"""x"""\nif X:\n  Y: int = 1\n  "y"\nclass C:\n  "c"\n  a: int\n  "a"\n  def f(self):\n    "f"\n    "no"\n'
    assert [text for _, text in docstrings(parse_source(code))] == ["m", "x", "y", "c", "a", "f"]


def test_at_most_one_docstring_of_a_hundred_is_a_riddle() -> None:
    """A fact in place of a question: "Return the handler of a class", not "What handles a class"."""
    found = [
        (f"{path.relative_to(SILBO.parent)}:{line}", text)
        for path in sorted(SILBO.rglob("*.py"))
        for line, text in docstrings(parse_source(path.read_text(encoding="utf-8")))
    ]
    riddles = [f"{place}: {text.splitlines()[0]}" for place, text in found if text.split()[0].strip(",:;.") in RIDDLES]
    assert len(found) > 900
    assert len(riddles) <= len(found) // 100, "\n".join(riddles)
