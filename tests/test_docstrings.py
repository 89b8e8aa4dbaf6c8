"""Every public module, class and function of nasray says what it is for."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nasray"
# What has none yet; may only get shorter. The aim is an empty list.
MISSING: set[str] = set()


def undocumented(path: Path) -> Iterator[str]:
    """The public definitions of a file, and the file itself, that lack a docstring.

    A definition in a function, or one whose name or class begins with "_", is not public.
    """
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    tree = ast.parse(path.read_text())
    if not ast.get_docstring(tree):
        yield name

    def look(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for node in parent.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_") or overrides(node):
                continue
            if not ast.get_docstring(node):
                yield f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from look(node, f"{prefix}.{node.name}")

    yield from look(tree, name)


def overrides(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether somebody else says what it does: torch of forward(), or typing.override."""
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    return node.name == "forward" or bool(marks & {"override", "overload"})


def test_everything_public_has_a_docstring():
    found = {name for path in sorted(PACKAGE.rglob("*.py")) for name in undocumented(path)}
    assert found - MISSING == set(), "no docstring"
    assert MISSING - found == set(), "has one by now: take it off the list"
