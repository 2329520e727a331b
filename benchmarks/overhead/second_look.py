"""``python -m benchmarks.overhead.second_look``: the seconds of a second look, beside those of a validation pass.

The same samples are as many controls as looked at: a forward costs the same, so what a look takes more is the fetching,
and what is kept and put back.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from benchmarks.common.workloads import WORKLOADS, Workload
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.runtime.second_look import SecondLook


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead.second_look", description=__doc__)
    parser.add_argument("--samples", type=int, default=512, help="of a look, and held-out ones of a validation")
    parser.add_argument("--evaluations", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{options.samples} samples      validation s    look s    look / validation    noting a step, µs")
    for workers in (0, 2):
        for workload in WORKLOADS:
            looks = measure(workload, options.samples, workers, options.evaluations, seed=0)
            validation, look = median(looks.validations[1:]), median(looks.looks[1:])  # the first is a warm-up
            noting = 1e6 * median(looks.noting)
            name = f"{workload.name}, {workers} workers"
            print(f"{name:32}{validation:8.2f}{look:10.2f}{look / validation:16.2f}{noting:20.1f}", flush=True)


if __name__ == "__main__":
    main()
