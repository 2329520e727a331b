"""A baseline: the samples with the highest losses are not trained on (Kang & Hashimoto 2020)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_memsink.actions import Actions
from lightning_memsink.capture import UNREADABLE
from lightning_memsink.gathering import gather
from lightning_memsink.identity import batch_size
from lightning_memsink.ledger import Ledger
from lightning_memsink.loss_scale import loss_scale
from lightning_memsink.loss_weights import OpenLoss
from lightning_memsink.strategies import require_support


class LossTruncation(Callback):
    """Leaves out samples whose loss now is above the ``1 - fraction`` quantile of the last ``window`` losses.

    It is here to be compared with: it drops what is rare and right along with what is noise, and was found to do
    nothing against memorization. Needs no other callback. Nothing is left out before ``window`` losses were seen.
    """

    def __init__(self, fraction: float = 0.05, window: int = 1000) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is a share of samples between 0 and 1, but it is {fraction}.")
        if window < 2:
            raise ValueError(f"window is a number of losses, at least 2, but it is {window}.")
        self.fraction, self.window = fraction, window
        self.actions = Actions(f"leaves out the {fraction:.0%} of samples with the highest losses", "gradient")
        self.recent = torch.zeros(0)
        """The last losses, up to ``window``, oldest first."""
        self._size: int | None = None
        self._open: OpenLoss | None = None
        self._found: tuple[Tensor, Tensor, float] | None = None  # losses, out, removed
        self._said = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_support(trainer.strategy, "LossTruncation")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Ledger.of(trainer).actions["LossTruncation"] = self.actions

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._size, self._found = batch_size(batch), None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self._size:
            return
        try:
            self._open = OpenLoss(loss, self._size, loss_scale(trainer))
            losses = self._open.losses().cpu()
            out = torch.zeros_like(losses, dtype=torch.bool)
            if len(self.recent) == self.window:
                out = losses > self.recent.quantile(1 - self.fraction)
            self._open.weigh_samples(1 - out.float())
            self._found = losses, out, float(self._open.shares().cpu()[out].sum())
        except UNREADABLE as error:
            if not self._said:
                self._said = True
                rank_zero_warn(f"LossTruncation leaves every sample of such a step alone: {error}.")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._found is not None:
            losses, out, removed = self._found
            self.actions.add(len(losses), int(out.sum()), removed)
        # One threshold for all processes, of what all of them saw.
        seen = torch.cat([self.recent, *gather(torch.zeros(0) if self._found is None else self._found[0])])
        self.recent = seen[torch.isfinite(seen)][-self.window :]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.actions.settle(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, "actions": self.actions.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = state_dict["recent"].clone()
        self.actions.load_state_dict(state_dict["actions"])

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
