"""Real fits whose samples have keys of the user's own: names in the reports, and none in what W&B records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import wandb
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.run_report import RunReport
from lightning_memsink.examples.resumable import EpochShuffledSampler
from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.loggers.wandb import SafeWandbLogger
from lightning_memsink.reporting.parquet import detect, read_ledger
from tests.support.small_runs import CONTROLS, TRAIN, fit
from tests.support.wandb_reader import read_run

pytestmark = pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")

ORDINARY = 200
"""Rows of `TRAIN` before the canaries, which are four in turn."""
Key = Callable[[str, int], Any]
"""Of a sample: from its kind, ``"ordinary"``, ``"canary"`` or ``"control"``, and its number."""


class Named(Dataset[dict[str, Any]]):
    """Rows of tokens with keys."""

    def __init__(self, tokens: Tensor, keys: list[Any]) -> None:
        self.tokens, self.keys = tokens, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "sample_id": self.keys[index]}


def text_key(kind: str, number: int) -> str:
    return f"Jane Doe {kind} {number}"


def train_keys(key: Key) -> list[Any]:
    canaries = [key("canary", row % 4) for row in range(len(TRAIN) - ORDINARY)]
    return [*(key("ordinary", row) for row in range(ORDINARY)), *canaries]


def fit_named(key: Key, report: Path, rows: int = len(TRAIN), epochs: int = 1, **options: Any) -> Trainer:
    """The trainer after a fit on the first ``rows`` of `TRAIN`. It flags the canaries, and writes a report."""
    train = DataLoader(Named(TRAIN[:rows], train_keys(key)[:rows]), 16, sampler=EpochShuffledSampler(rows))
    controls = DataLoader(Named(CONTROLS, [key("control", row) for row in range(len(CONTROLS))]), 40)
    callbacks = [LossTracker(), MemorizationDetector(k=4), LiveCurves(), RunReport(report)]
    return fit(callbacks, train=train, controls=controls, max_epochs=epochs, **options)[0]


def listed(report: Path) -> list[str | None]:
    """The names of the most memorized samples in the JSON of a report."""
    numbers = json.loads(report.with_suffix(".json").read_text())["numbers"]
    return [sample.get("name") for sample in numbers["memorized"]]


def parquet_names(report: Path, file: str) -> list[str]:
    path = report.with_name(f"{report.stem}_files") / "ledger" / f"{file}.parquet"
    return pq.read_table(path)["sample_name"].to_pylist()


@pytest.mark.filterwarnings("ignore:.*could not measure")  # the canaries are no longer in the data
def test_a_run_with_tuples_lists_them_and_one_that_resumes_goes_on(tmp_path):
    """The second run never meets a canary: what it knows of them is in the checkpoint."""

    def key(kind: str, number: int) -> tuple[str, int]:
        return kind, number

    first, second = tmp_path / "first.md", tmp_path / "second.md"
    trainer = fit_named(key, first)
    canaries = {str(("canary", number)) for number in range(4)}
    assert set(listed(first)) == canaries
    assert set(parquet_names(first, "samples")) == set(map(str, train_keys(key)))
    assert sorted(parquet_names(first, "controls")) == sorted(str(("control", row)) for row in range(len(CONTROLS)))
    losses = Ledger.of(trainer).losses
    assert [str(key) for key in losses.names.of(losses.ids)] == parquet_names(first, "samples")
    flags, _ = detect(tmp_path / "first_files" / "ledger")
    table, _ = read_ledger(tmp_path / "first_files" / "ledger")
    assert set(table.names.of(table.ids[flags.memorized])) >= canaries, "one evaluation may flag more than two do"
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fit_named(key, second, rows=ORDINARY, epochs=2, ckpt_path=tmp_path / "run.ckpt")
    assert set(listed(second)) == canaries
    assert parquet_names(second, "samples") == parquet_names(first, "samples")


def test_a_run_with_integers_has_no_names_anywhere(tmp_path):
    report = tmp_path / "report.md"
    trainer = fit_named(lambda kind, number: number + {"ordinary": 0, "canary": 1000, "control": 2000}[kind], report)
    assert listed(report) == [None] * 4 and "| sample | exposures |" in report.read_text()
    table, _ = read_ledger(tmp_path / "report_files" / "ledger")
    assert len(table.names) == len(Ledger.of(trainer).losses.names) == 0
    assert not (tmp_path / "report_files" / "without_names").exists()


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The folder of all that W&B wrote of a run with strings, and the run's report outside it."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    where = tmp_path / "wandb_only"
    where.mkdir()
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(where))
    wandb.teardown()
    fit_named(text_key, tmp_path / "report.md", logger=SafeWandbLogger(offline=True, save_dir=where))
    wandb.finish()
    wandb.teardown()
    return where, tmp_path / "report.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_name_is_in_what_wandb_records(recorded):
    """Neither in tables, nor in the terminal's output, nor in the report that is kept as an artifact."""
    where, report = recorded
    assert set(listed(report)) == {text_key("canary", number) for number in range(4)}
    assert report.with_suffix(".html").read_text().count("Jane Doe canary") == 4
    run = read_run(where)
    numbers = {
        sample["sample"] for sample in json.loads(report.with_suffix(".json").read_text())["numbers"]["memorized"]
    }
    assert {row["hash"] for row in run.table("memsink/memorized_samples")} == numbers
    (artifact,) = [one for one in run.artifacts if one["type"] == "memsink-report"]
    assert {"report.md", "report.html", "report.json"} <= {entry["path"] for entry in artifact["manifest"]["contents"]}
    output = (run.path / "files" / "output.log").read_text()
    assert all(f"Sample {number}: seen" in output for number in numbers), "W&B records the terminal"
    files = [file for file in where.rglob("*") if file.is_file()]
    tables = [file for file in files if file.read_bytes()[:4] == b"PAR1"]
    assert len(tables) == 2, "the ledger is staged for the artifact"
    assert not any("sample_name" in pq.read_table(file).column_names for file in tables)
    pages = [file for file in files if b"What this run memorized" in file.read_bytes()]
    assert len(pages) >= 3, "and so is the report"
    assert not any(b"Jane Doe" in file.read_bytes() for file in files)
    assert "Jane Doe" not in repr(run)
