"""What callbacks that act on training have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_memsink.actions import Actions
from lightning_memsink.capture import UNREADABLE
from lightning_memsink.identity import batch_size
from lightning_memsink.ledger import Ledger
from lightning_memsink.loss_scale import loss_scale
from lightning_memsink.loss_weights import OpenLoss
from lightning_memsink.strategies import Reads, require_support


class Mitigation(Callback, ABC):
    """Refuses at the start what it can't act under, publishes and saves what it did, and lets go of the model however
    training ends. ``actions`` is made in ``__init__``."""

    reads: ClassVar[Reads] = "losses"
    actions: Actions

    @abstractmethod
    def _let_go(self) -> None:
        """Hooks and whatever else holds the model or a batch."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_support(trainer.strategy, type(self).__name__, self.reads)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Ledger.of(trainer).actions[type(self).__name__] = self.actions

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.actions.settle(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        return {"actions": self.actions.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.actions.load_state_dict(state_dict["actions"])


class LossWeighing(Mitigation):
    """Weighs the loss of each step in its backward, and needs no other callback for it."""

    def __init__(self) -> None:
        self._size: int | None = None
        self._open: OpenLoss | None = None
        self._said = False

    @abstractmethod
    def _weigh(self, opened: OpenLoss) -> None:
        """Before the backward. Whatever of `UNREADABLE` it raises leaves the step as it is."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._size = batch_size(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        size = Ledger.of(trainer).samples_in_hand(self._size)
        if not size:
            return
        try:
            self._open = OpenLoss(loss, size, loss_scale(trainer))
            self._weigh(self._open)
        except UNREADABLE as error:
            if not self._said:
                self._said = True
                rank_zero_warn(f"{type(self).__name__} leaves every sample of such a step alone: {error}.")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
