"""Every public module, class and function of nasray says what it is for."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nasray"


def definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The public classes and functions in the body of a module or a class."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
# What a protocol says of a method holds in every class that has it.
OF_PROTOCOLS = {
    method.name
    for tree in TREES.values()
    for protocol in definitions(tree.body)
    if isinstance(protocol, ast.ClassDef) and "Protocol" in map(ast.unparse, protocol.bases)
    for method in definitions(protocol.body)
    if ast.get_docstring(method)
} | {"forward"}  # torch's


def undocumented(path: Path) -> Iterator[str]:
    """What lacks a docstring of a file's public definitions, and of the file itself."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    if not ast.get_docstring(TREES[path]):
        yield module
    for node in definitions(TREES[path].body):
        if not ast.get_docstring(node):
            yield f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef):
            for method in definitions(node.body):
                if not ast.get_docstring(method) and method.name not in OF_PROTOCOLS:
                    yield f"{module}.{node.name}.{method.name}"


def test_everything_public_has_a_docstring():
    assert [name for path in TREES for name in undocumented(path)] == []
