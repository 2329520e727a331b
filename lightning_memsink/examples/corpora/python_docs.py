"""Real English on every machine that has Python: Python's own documentation."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests are no documentation, site-packages differ between machines, encodings are tables that are slow to parse.
_LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idle_test", "lib2to3", "site-packages", "test", "tests"}


def python_docs(root: Path | None = None) -> list[str]:
    """Docstrings of the standard library, then the language reference: about 2 MB, some 8,000 texts.

    Duplicates stay, as in any natural corpus. The order is that of files and lines, the same on every run; the text
    is that of this Python's version. Sources are parsed, never imported.

    Args:
        root: the standard library's folder; None for this Python's own.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    docs = [doc for source in _sources(folder) for doc in _docstrings(source)]
    topics = folder / "pydoc_data" / "topics.py"
    if topics.exists():
        docs += _strings_in_dicts(topics)
    if not docs:
        raise FileNotFoundError(
            f"Found no documented Python source under {folder}. This Python ships without its sources; "
            f"use a full installation, or train on a text file of your own (recipes/watch_hf.yaml)."
        )
    return docs


def _sources(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _LEFT_OUT)  # os.walk enters what is left in this very list
        yield from (Path(parent) / name for name in sorted(files) if name.endswith(".py"))


def _docstrings(source: Path) -> Iterator[str]:
    try:
        todo: list[ast.AST] = [ast.parse(source.read_bytes())]
    except (SyntaxError, ValueError):  # templates that are no Python
        return
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield doc
            todo += reversed(node.body)


def _strings_in_dicts(source: Path) -> list[str]:
    """The values of ``topics = {"assert": "The assert statement...", ...}``."""
    tables = [node for node in ast.walk(ast.parse(source.read_bytes())) if isinstance(node, ast.Dict)]
    values = [value for table in tables for value in table.values]
    return [node.value for node in values if isinstance(node, ast.Constant) and isinstance(node.value, str)]
