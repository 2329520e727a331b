"""Python's own source code: text of another kind than its documentation, and on every machine too."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path


def python_code(root: Path | None = None) -> list[str]:
    """Source of each top-level function and class of the standard library, without comments and docstrings.

    In the order of files and lines, formatted by ``ast.unparse``; some 3,000 texts.

    Args:
        root: folder of the standard library; None for that of the running Python.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    return [text for file in sorted(folder.glob("*.py")) for text in _code_of(file)]


def _code_of(file: Path) -> list[str]:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    parts = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.unparse(node) for node in tree.body if isinstance(node, parts)]
