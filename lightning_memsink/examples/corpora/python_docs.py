"""Python's own documentation: real English text that comes with every full installation of Python."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests hold no documentation, site-packages differ between machines, encodings are tables that are slow to parse.
_EXCLUDED = {"__pycache__", "dist-packages", "encodings", "idle_test", "lib2to3", "site-packages", "test", "tests"}


def python_docs(root: Path | None = None) -> list[str]:
    """Docstrings of the standard library, then the language reference: about 2 MB, some 8,000 texts.

    Duplicates are kept, as in any natural corpus. The order is that of files and lines, the same in every run; the text
    depends on the version of Python. Sources are parsed, never imported.

    Args:
        root: folder of the standard library; None for that of the running Python.

    Raises:
        FileNotFoundError: the folder holds no documented source.
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
        folders[:] = sorted(set(folders) - _EXCLUDED)  # in place: os.walk enters the folders in this list
        yield from (Path(parent) / name for name in sorted(files) if name.endswith(".py"))


def _docstrings(source: Path) -> Iterator[str]:
    try:
        todo: list[ast.AST] = [ast.parse(source.read_bytes())]
    except (SyntaxError, ValueError):  # a template, not Python code
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
