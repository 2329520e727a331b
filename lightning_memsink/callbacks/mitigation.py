"""What callbacks that act on training have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_memsink.callbacks.runtime.loss_scale import loss_scale
from lightning_memsink.callbacks.runtime.strategies import Reads, require_support
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.capture import UNREADABLE
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.mitigation.intervention_log import Actions
from lightning_memsink.samples.batch import batch_size


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
        self._let_go()

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
    """Weighs the loss of each step in its backward."""

    def __init__(self) -> None:
        self._size: int | None = None
        self._open: OpenLoss | None = None
        self._said: set[str] = set()

    @abstractmethod
    def _weigh(self, opened: OpenLoss) -> None:
        """Before the backward. Whatever of `UNREADABLE` it raises leaves the step as it is."""

    def _samples(self, ledger: Ledger) -> int:
        """Of the batch in hand; where there are none, the step is left as it is."""
        return ledger.samples_in_hand(self._size)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._size = batch_size(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        ledger = Ledger.of(trainer)
        size = self._samples(ledger)
        if not size:
            return
        try:
            nodes = ledger.batch.loss_nodes(loss) if ledger.has("batch") else None
            self._open = OpenLoss(loss, size, loss_scale(trainer), nodes)
            self._weigh(self._open)
        except UNREADABLE as error:
            self._say_once("every sample of such a step", str(error))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def _let_go(self) -> None:
        self._close()

    def _say_once(self, whom: str, why: str) -> None:
        if whom not in self._said:
            self._said.add(whom)
            rank_zero_warn(f"{type(self).__name__} leaves {whom} alone: {why}.")

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
