"""Reads an offline W&B run with W&B's own reader (``wandb leet inspect``)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RecordedRun:
    """What a run recorded, in this order."""

    path: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    """A dict a ``run.log``; keys of nested values are joined by dots."""
    summary: dict[str, Any] = field(default_factory=dict)
    """As W&B will show it: a metric defined with more than one statistic is a dict of them."""
    config: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """The arguments of each ``define_metric``."""
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    """Files that were kept with the run."""

    def series(self, name: str) -> list[tuple[int, float]]:
        """(``trainer/global_step``, value) of every row that has ``name``."""
        return [(int(row["trainer/global_step"]), row[name]) for row in self.history if name in row]

    def table(self, name: str) -> list[dict[str, Any]]:
        """All rows of a table logged under ``name``, increments in the order they were written."""
        where = self.path / "files" / "media" / "table"
        parts = sorted((where / name).parent.glob(f"{Path(name).name}_*.table.json"), key=_increment)
        contents = [json.loads(part.read_text()) for part in parts]
        return [dict(zip(one["columns"], row, strict=True)) for one in contents for row in one["data"]]


def read_run(path: str | Path) -> RecordedRun:
    """Reads a run's directory (``…/wandb/offline-run-…``), or the latest run of a directory that holds ``wandb/``.

    Raises:
        FileNotFoundError: where there is no run.
    """
    where = _run_directory(Path(path))
    at_end = json.loads(_inspect(where, "--summary"))
    run = RecordedRun(where, summary=at_end["summary"], config=at_end["config"])
    for record in map(json.loads, _inspect(where).splitlines()):
        kind = record["type"]
        content = record.get(kind, {})
        if kind == "history":
            run.history.append(content["item"])
        elif kind == "alert":
            run.alerts.append(content)
        elif kind == "metric":
            run.metrics.append(content)
        elif kind == "artifact":
            run.artifacts.append(content)
    return run


def _run_directory(path: Path) -> Path:
    if list(path.glob("run-*.wandb")):
        return path
    runs = sorted(path.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"No W&B run at {path}: looked for run-*.wandb there and in wandb/*run-*/ below.")
    return runs[-1].parent


def _inspect(run: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _increment(part: Path) -> int:
    """``top_3_0123abcd.table.json``: 3."""
    return int(part.name.rsplit("_", 2)[-2])
