"""Base classes of the callbacks that change training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.host_copies import HostCopies
from lightning_memsink.callbacks.runtime.loss_scale import loss_scale
from lightning_memsink.callbacks.runtime.packed_batches import PackedBatches
from lightning_memsink.callbacks.runtime.strategies import Reads, require_support
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.row_orders import NotWatched
from lightning_memsink.losses.sample_rows import SampleAxisLost
from lightning_memsink.losses.step_reader import StepReader
from lightning_memsink.losses.unreadable import InternalError, UnreadableLoss, internal_error
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.samples.batch import batch_size


class Mitigation(Callback, ABC):
    """Base of all mitigations: checks the strategy, publishes and saves the intervention log, and detaches.

    It refuses strategies under which the mitigation can't work, and detaches from the model however training ends.
    A subclass makes ``interventions`` in ``__init__`` and sets ``saves_samples``.
    """

    reads: ClassVar[Reads] = "losses"
    saves_samples: ClassVar[bool]
    """Whether the state refers to samples of the ledger, so that a new ledger leaves it out; see `leave_out`."""
    interventions: InterventionLog

    @abstractmethod
    def _detach(self) -> None:
        """Removes hooks and drops all references to the model or a batch."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_support(trainer.strategy, type(self).__name__, self.reads)
        self._detach()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Ledger.of(trainer).interventions[type(self).__name__] = self.interventions

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._close_evaluation(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # LossTracker's own controls are evaluated between two batches, without a validation.
        controls = Ledger.of(trainer).get(Ledger.controls)
        if controls is not None and controls.latest_step > self.interventions.latest_step:
            self._close_evaluation(controls.latest_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_evaluation(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {"actions": self.interventions.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.interventions.load_state_dict(state_dict["actions"])

    def _count(self) -> None:
        """Counts what a device has still to say of the steps so far."""

    def _levels(self) -> dict[str, float]:
        """What the mitigation acts by, by name, for the record of an evaluation; the same in every process."""
        return {}

    def _close_evaluation(self, step: int) -> None:
        self._count()
        self.interventions.close_evaluation(step, **self._levels())


class LossWeighing(Mitigation):
    """Base of mitigations that put weights on the samples or tokens of each step's loss, in its backward."""

    def __init__(self) -> None:
        self._size: int | None = None
        self._own_reader: StepReader | None = None  # where there is no LossTracker, whose reader serves all
        self._open: OpenLoss | None = None
        self._counts = HostCopies()
        self._packed = PackedBatches()
        self._warnings = WarningCache()

    @abstractmethod
    def _weigh(self, opened: OpenLoss) -> None:
        """Puts weights on ``opened``, before its backward. If it raises, the step runs without weights.

        An `UnreadableLoss` is a loss of the user's that can't be weighed; any other exception is a mistake of ours.
        """

    def _samples(self, ledger: Ledger) -> int:
        """Number of samples in the current batch; 0 leaves the step unchanged."""
        return ledger.current_batch_size(self._size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._own_reader = StepReader(pl_module) if Ledger.of(trainer).get(Ledger.batch) is None else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        documents = None if self._own_reader is None else self._packed.documents_in(batch)
        self._size = batch_size(batch) if documents is None else documents.count
        if self._own_reader is not None and self._size:
            axes = None if documents is None else documents.axes(batch)
            self._own_reader.begin(batch, self._size, axes, is_packed=documents is not None)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        ledger = Ledger.of(trainer)
        size = self._samples(ledger)
        if not size:
            return
        try:
            reader = ledger.batch.reader if self._own_reader is None else self._own_reader
            scale = loss_scale(trainer)
            self._open = OpenLoss(loss, size, reader.read(loss, scale), scale)
            self._weigh(self._open)
        except NotWatched:
            pass
        except SampleAxisLost as error:
            self._warn(
                "every sample of such a step",
                f"the rows of its loss can't be assigned to samples ({error}). End training_step with `return "
                "per_sample(losses, ids)`",
            )
        except UnreadableLoss as error:
            self._warn("every sample of such a step", str(error))
        except Exception as error:  # it must not end the training
            warn_once(self._warnings, f"{internal_error(type(self).__name__, error)}.", category=InternalError)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._own_reader is not None:
            self._own_reader.end()

    def _count(self) -> None:
        self._counts.drain()

    def _detach(self) -> None:
        self._close()
        self._counts.clear()
        if self._own_reader is not None:
            self._own_reader.end()

    def _warn(self, samples: str, reason: str) -> None:
        """Warns once for each group of ``samples`` that trains without weights."""
        warn_once(self._warnings, f"{type(self).__name__} leaves {samples} alone: {reason}.", key=samples)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
