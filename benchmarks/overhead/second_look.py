"""The seconds of a second look, beside those of a validation pass.

The same samples are as many controls as looked at: a forward costs the same, so what a look takes more is the fetching,
and what is kept and put back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.common.workloads import Workload
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.runtime.second_look import SecondLook

SAMPLES = 512
"""Of a look, as many as the detector looks at by default."""


class Looks(Callback):
    """Looks at ``samples`` random samples after each validation, and times both.

    Args:
        tracker: before this callback.
        samples: of a look.
    """

    def __init__(self, tracker: LossTracker, samples: int) -> None:
        self.tracker, self.samples = tracker, samples
        self.looks: list[float] = []
        self.validations: list[float] = []
        self.noting: list[float] = []
        self._begun = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tracker = self.tracker
        self.second = SecondLook(tracker.sample_ids, tracker.loader_ids, tracker.table, tracker.control_capture)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        begun = time.perf_counter()
        self.second.note(trainer, batch)
        self.noting.append(time.perf_counter() - begun)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.perf_counter()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations.append(time.perf_counter() - self._begun)
        rows = torch.randperm(len(self.tracker.table))[: self.samples]
        look = self.second.measure(trainer, pl_module, rows, "validation_step")
        assert len(look.rows) == len(rows)
        self.looks.append(look.seconds)


def measure(workload: Workload, samples: int, workers: int, evaluations: int, seed: int) -> Looks:
    """One fit of the workload on four times as many samples as are looked at."""
    seed_everything(seed, verbose=False)
    tracker = LossTracker(families=False)
    looks = Looks(tracker, samples)
    size = workload.batch_size
    steps = 4 * samples // size
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps * evaluations // 2,
        val_check_interval=steps // 2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[tracker, looks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = DataLoader(workload.data(4 * samples, seed), size, shuffle=True, num_workers=workers)
    trainer.fit(workload.module(), train, DataLoader(workload.data(samples, seed + 1), size))
    return looks


@dataclass(frozen=True)
class LookCost:
    """Medians of one fit, without its first evaluation: seconds of a look and of a validation pass over as many."""

    name: str
    look: float
    validation: float
    noting: float
    """Seconds a step, to be able to look again."""

    @property
    def ratio(self) -> float:
        return self.look / self.validation


def look_cost(workload: Workload, samples: int = SAMPLES, workers: int = 0, evaluations: int = 4) -> LookCost:
    """What a look takes beside a validation pass over as many samples."""
    looks = measure(workload, samples, workers, evaluations, seed=0)
    return LookCost(workload.name, median(looks.looks[1:]), median(looks.validations[1:]), median(looks.noting))


def look_table(costs: Sequence[LookCost]) -> Table:
    table = Table("workload", "look s", "validation pass s", "look / pass", "noting µs/step",
                  title=f"A second look at {SAMPLES} samples, beside a validation pass over as many")  # fmt: skip
    for each in costs:
        table.add_row(
            each.name, f"{each.look:.2f}", f"{each.validation:.2f}", f"{each.ratio:.2f}", f"{1e6 * each.noting:.0f}"
        )
    return table
