"""Answers on disk, so that an audit that was interrupted goes on where it stopped."""

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
    """A line a text, by the text's hash: the file tells no text. The first line says what the answers are of.

    Args:
        path: made if need be; what an interrupted run left there is read.
        about: model and settings, plain values. Answers to other questions are not mixed with these.

    Raises:
        ValueError: the file is of another model, of other settings, or no such file.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        head = {"version": VERSION, **about}
        if path.exists() and path.stat().st_size:
            self._read(head)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write([head])

    def get(self, text: str) -> dict[str, Any] | None:
        """The answers for a text, None if it was not asked for yet."""
        return self._found.get(_key(text))

    def add(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """By text; on disk when this returns."""
        rows = [{"text": _key(text), **told} for text, told in answers.items()]
        self._write(rows)
        self._remember(rows)

    def _read(self, head: Mapping[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()  # what is no JSON is passed over
        found = _parsed(lines[0])
        if found is None or found != json.loads(json.dumps(head)):
            differs = [name for name in head if found is None or found.get(name) != head[name]]
            raise ValueError(
                f"{self.path} has answers of another audit (it differs in {', '.join(differs) or 'its settings'}). "
                "Write this one to another folder (--out DIR), or delete that file."
            )
        whole = []
        for line in lines[1:]:
            row = _parsed(line)
            if row is None:  # the run was killed while it wrote this one
                continue
            whole.append(row)
        self._remember(whole)
        if len(whole) + 1 < len(lines):
            with written_whole(self.path) as unfinished:
                unfinished.write_text("".join(f"{json.dumps(row)}\n" for row in [head, *whole]), encoding="utf-8")

    def _remember(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._found[row["text"]] = {name: value for name, value in row.items() if name != "text"}

    def _write(self, rows: list[Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
