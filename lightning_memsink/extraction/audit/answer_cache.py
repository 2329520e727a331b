"""Results of an audit on disk, so that an interrupted audit resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_memsink._files import written_whole

VERSION = 1


class AnswersFile:
    """A JSONL file with one line per text, keyed by the text's hash: no text can be read from it.

    The first line is a header with the model and the settings that the results depend on.

    Args:
        path: is created if it does not exist; otherwise the results of an interrupted audit are read from it.
        header: model and settings, plain values. A file with another header is refused.

    Raises:
        ValueError: the file has another header, or it is no such file.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._results: dict[str, dict[str, Any]] = {}
        first_line = {"version": VERSION, **header}
        if path.exists() and path.stat().st_size:
            self._read(first_line)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append([first_line])

    def get(self, text: str) -> dict[str, Any] | None:
        """The results of a text; None if it was not probed yet."""
        return self._results.get(_key(text))

    def add(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds results by text; they are on disk when this returns."""
        rows = [{"text": _key(text), **values} for text, values in results.items()]
        self._append(rows)
        self._remember(rows)

    def _read(self, first_line: Mapping[str, Any]) -> None:
        lines = self.path.read_text(
            encoding="utf-8", errors="replace"
        ).splitlines()  # a line that is no JSON is skipped
        header = _parsed(lines[0])
        if header is None or header != json.loads(json.dumps(first_line)):
            differs = [name for name in first_line if header is None or header.get(name) != first_line[name]]
            raise ValueError(
                f"{self.path} has answers of another audit (it differs in {', '.join(differs) or 'its settings'}). "
                "Write this one to another folder (--out DIR), or delete that file."
            )
        complete = []
        for line in lines[1:]:
            row = _parsed(line)
            if row is None:  # the audit was killed while it wrote this line
                continue
            complete.append(row)
        self._remember(complete)
        if len(complete) + 1 < len(lines):
            with written_whole(self.path) as unfinished:
                rows = [first_line, *complete]
                unfinished.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    def _remember(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._results[row["text"]] = {name: value for name, value in row.items() if name != "text"}

    def _append(self, rows: list[Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    """The JSON object in a line; None if it holds none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
