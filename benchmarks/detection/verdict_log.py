"""Which samples were memorized after which evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_memsink.ledger import Ledger


class VerdictLog(Callback):
    """The step of the first evaluation at which each of the samples ``ids`` ``[N]`` was memorized.

    It asks after every hook in which an evaluation may have ended, so that it needs no place in the list of callbacks.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.first_step = torch.full((len(ids),), math.inf)
        """``[N]`` optimizer steps; infinite for a sample that was never memorized."""
        self._noted = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._note(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        ledger = Ledger.of(trainer)
        evaluations = ledger.flags.evaluations
        if len(evaluations) == self._noted:
            return
        self._noted = len(evaluations)
        memorized = torch.isin(self.ids, ledger.losses.ids[: len(ledger.flags.verdict)][ledger.flags.memorized])
        is_first = memorized & self.first_step.isinf()
        self.first_step[is_first] = float(evaluations[-1].step)
