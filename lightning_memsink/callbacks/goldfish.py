"""Training by the goldfish loss (Hans et al. 2024): some target tokens of a passage are never trained on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink.callbacks.runtime.mitigation import LossWeighing
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.mitigation.goldfish import drop_targets
from lightning_memsink.mitigation.intervention_log import InterventionLog


class Goldfish(LossWeighing):
    """Drops about one in ``k`` target tokens from the gradient: the goldfish loss (Hans et al. 2024).

    A hash of the ``context`` targets before a target decides, so a passage loses the same tokens wherever it occurs.
    The other targets are scaled up by total over kept, so that the loss of a batch stays a mean over its kept tokens.
    With several processes, it is a mean over the kept tokens of each process's batch. The loss that is logged and the
    ledger's losses are over all tokens. If the loss is computed in chunks along time, the first ``context`` targets of
    each chunk are kept. Needs no other callback.

    Args:
        k: one in k tokens is dropped; at least 2. The paper uses 4 (and states that training then needs 4/3 as much
            text to learn as much).
        context: number of targets hashed; 13 in the paper. With fewer, more passages share a context.
        seed: of the hash, which chooses the tokens.
    """

    saves_samples = False

    def __init__(self, k: int = 4, context: int = 13, seed: int = 0) -> None:
        if k < 2:
            raise ValueError(f"k: one in k tokens is dropped, so it is at least 2, but it is {k}.")
        if context < 1:
            raise ValueError(f"context is a number of tokens, at least 1, but it is {context}.")
        super().__init__()
        self.k, self.context, self.seed = k, context, seed
        self.interventions = InterventionLog(
            f"leaves one in {k} target tokens out of the gradient, by their context", "tokens"
        )
        self._dropped: tuple[int, Tensor] | None = None  # visits, and what `drop_targets` returned

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._dropped = None

    def _weigh(self, opened: OpenLoss) -> None:
        self._dropped = opened.batch_size, drop_targets(opened, self.k, self.context, self.seed)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._dropped is not None:
            visits, dropped = self._dropped
            self._counts.put(lambda counts: self.interventions.add(visits, int(counts[0]), float(counts[1])), dropped)
