"""A baseline: the samples with the highest losses are not trained on (Kang & Hashimoto 2020)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink._distributed import gather
from lightning_memsink.callbacks.mitigation import LossWeighing
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.mitigation.intervention_log import InterventionLog


class LossTruncation(LossWeighing):
    """Leaves out samples whose loss now is above the ``1 - fraction`` quantile of the last ``window`` losses.

    It is here to be compared with: it drops what is rare and right along with what is noise, and was found to do
    nothing against memorization. Needs no other callback. Nothing is left out before ``window`` losses were seen.
    """

    def __init__(self, fraction: float = 0.05, window: int = 1000) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is a share of samples between 0 and 1, but it is {fraction}.")
        if window < 2:
            raise ValueError(f"window is a number of losses, at least 2, but it is {window}.")
        super().__init__()
        self.fraction, self.window = fraction, window
        self.interventions = InterventionLog(
            f"leaves out the {fraction:.0%} of samples with the highest losses", "gradient"
        )
        self.recent = torch.zeros(0)
        """The last losses, up to ``window``, oldest first."""
        self._found: tuple[Tensor, Tensor, float] | None = None  # losses, out, removed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._found = None

    def _weigh(self, opened: OpenLoss) -> None:
        losses = opened.losses().cpu()
        out = torch.zeros_like(losses, dtype=torch.bool)
        if len(self.recent) == self.window:
            out = losses > self.recent.quantile(1 - self.fraction)
        opened.weigh_samples(1 - out.float())
        self._found = losses, out, float(opened.shares().cpu()[out].sum())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._found is not None:
            losses, out, removed = self._found
            self.interventions.add(len(losses), int(out.sum()), removed)
        # One threshold for all processes, of what all of them saw.
        seen = torch.cat([self.recent, *gather(torch.zeros(0) if self._found is None else self._found[0])])
        self.recent = seen[torch.isfinite(seen)][-self.window :]

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = state_dict["recent"].clone()
        super().load_state_dict(state_dict)
