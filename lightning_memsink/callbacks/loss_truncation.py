"""Loss truncation (Kang & Hashimoto 2020), a baseline: the samples with the highest losses are not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink._distributed import gather
from lightning_memsink.callbacks.runtime.mitigation import LossWeighing
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.mitigation.loss_truncation import above_quantile, extend_window


@dataclass(frozen=True)
class _Truncation:
    """What was left out of one step."""

    losses: Tensor
    """``[B]`` on the CPU."""
    left_out: Tensor
    """Bool ``[B]``."""
    removed: float
    """0…1: share of the loss's coefficients."""


class LossTruncation(LossWeighing):
    """Leaves out samples whose loss is above the ``1 - fraction`` quantile of the last ``window`` losses.

    A baseline to compare with (Kang & Hashimoto 2020): it drops rare correct samples along with noise, and was found
    not to reduce memorization. Nothing is left out before ``window`` losses were recorded. Needs no other callback.

    Args:
        fraction: share of samples to leave out, between 0 and 1.
        window: number of recent losses that the quantile is taken of, at least 2.

    Raises:
        ValueError: for a number out of range.
    """

    saves_samples = False

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
        self._truncation: _Truncation | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._truncation = None

    def _weigh(self, opened: OpenLoss) -> None:
        losses = opened.losses().cpu()
        left_out = above_quantile(losses, self.recent, self.fraction, self.window)
        opened.weigh_samples(1 - left_out.float())
        self._truncation = _Truncation(losses, left_out, float(opened.shares().cpu()[left_out].sum()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step, self._truncation = self._truncation, None
        if step is not None:
            self.interventions.add(len(step.losses), int(step.left_out.sum()), step.removed)
        # The losses of all processes, so that all of them have one threshold.
        losses = gather(torch.zeros(0) if step is None else step.losses)
        self.recent = extend_window(self.recent, losses, self.window)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = state_dict["recent"].clone()
        super().load_state_dict(state_dict)
