"""A callback that takes second looks, for tests of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.runtime.second_look import Look, Mode, SecondLook


class Looks(Callback):
    """Looks at samples of a `LossTracker` at the end of each validation, or of each epoch of training.

    Args:
        tracker: before this callback in the list.
        mode: of the looks.
        at: the hook.
        pick: rows of the table from their number; all by default.
        samples: kept of a stream.
    """

    def __init__(
        self, tracker: LossTracker, mode: Mode = "validation_step", at: str = "on_validation_epoch_end", **options: Any
    ) -> None:
        self.tracker, self.mode = tracker, mode
        self.pick, self.samples = options.get("pick", torch.arange), options.get("samples", 512)
        self.looks: list[Look] = []
        self.truth: list[Tensor | None] = []
        """What `measured` says at each look."""
        self.measured: Any = options.get("measured", lambda module, rows: None)
        vars(self)[at] = self.look

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tracker = self.tracker
        capture = tracker.control_capture
        self.second = SecondLook(tracker.sample_ids, tracker.loader_ids, tracker.table, capture, self.samples)
        self.second.attach(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.second.note(trainer, batch)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.tracker.visits.flush()
        rows = self.pick(len(self.tracker.table))
        look = self.second.measure(trainer, pl_module, rows, self.mode)
        self.looks.append(look)
        self.truth.append(self.measured(pl_module, look.rows))


def watched(mode: Mode = "validation_step", tracker: LossTracker | None = None, **options: Any) -> list[Any]:
    """A tracker and a callback that looks."""
    tracker = tracker or LossTracker(families=False)
    return [tracker, Looks(tracker, mode, **options)]
