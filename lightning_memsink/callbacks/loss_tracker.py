"""The callback that writes per-sample losses to the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._distributed import gather
from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.batch_description import BatchDescription
from lightning_memsink.callbacks.runtime.checkpointing import leave_out, restoring
from lightning_memsink.callbacks.runtime.control_evaluation import ControlEvaluation
from lightning_memsink.callbacks.runtime.control_probe import ControlProbe
from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.callbacks.runtime.loss_scale import loss_scale
from lightning_memsink.callbacks.runtime.strategies import require_support
from lightning_memsink.callbacks.runtime.validation_weights import ValidationWeights
from lightning_memsink.callbacks.runtime.visit_recorder import VisitRecorder
from lightning_memsink.detection.difficulty import Matching
from lightning_memsink.detection.family_features import FamilyRecord
from lightning_memsink.ledger import CurrentBatch, Ledger
from lightning_memsink.losses.capture import LossOfSamples, StepCapture, reported
from lightning_memsink.losses.document_attention import ATTENDS_ACROSS
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.losses.per_sample import NotCaptured
from lightning_memsink.losses.unreadable import InternalError
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.documents import Segments
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.source_labels import NamesOf, SourceOf
from lightning_memsink.samples.visits import DescribedBatch, Visit


class LossTracker(Callback):
    """Writes every sample's losses to the ledger, and the held-out controls' beside them.

    Losses come from the user's own loss call; there is no second forward on a training batch. The controls are
    the validation set: their losses are taken in the validation loop as it runs.

    Args:
        identity: what makes two visits the same sample. ``index``: its place in the data set. ``content``: equal
            token sequences (or tensors) share one id, so that duplicates count as visits of one sample.
            ``key``: ``batch[key]``. ``auto``: the key if the batch has it, else the content of batches of tokens (a
            text is one sample, wherever it stands), else the index, else the content.
        key: name of the user's own ids in the batch.
        segments: ``segments(batch) -> [R, T]``, the number of the document that each token is of, negative for padding,
            where rows hold several documents and the batch doesn't say so (`samples.documents`). Documents are the
            samples then.
        depth: recent losses remembered per sample, for you to read in the ledger; 2 bytes each.
        features: ``features(batch) -> [B, F]``, what samples are matched on. For batches of tokens the default is
            n-gram likelihood and compressed size; for others there is none, and a sample is compared with all controls.
        source: where a batch says the source of its samples (data set, licence, customer): a key of the batch, or
            ``source(batch)`` -> labels, one a sample, one a row (its documents inherit it), a list a row, or integers
            ``[R, T]``. None: no sources.
        names: labels for what the batch has instead: ``["books", "web"]`` for 0 and 1, or a mapping.
        families: look for near-duplicates among texts, beside training.
        loss: ``loss(batch, outputs) -> [B]``, each sample's loss from what ``training_step`` (and ``validation_step``)
            returned, where it can't be read from the step itself; it wins over what could be read.
        controls: a loader of held-out samples, if the validation set is not the one to compare with.
        control_fraction: split this share off the training set before training, and use it as controls.
        control_every: optimizer steps between two evaluations of such controls, or of none where there is no validation
            set: then first visits of samples are the controls. Lightning evaluates a validation set.
        flush_every: steps between two writes to the table, of which there are more where batches hold very many tokens.
            Between them a step only appends to a list. What a write does with texts is done beside training.
        new_ledger: when resuming, leave the checkpoint's ledger alone and begin a new one, with all that callbacks of
            this package know of samples. Weights, optimizer and progress are resumed.

    Raises:
        ValueError: when both `controls` and `control_fraction` are given, or the latter can't be split off.
    """

    saves_samples = True

    def __init__(
        self,
        identity: Literal["auto", "index", "content", "key"] = "auto",
        key: str = "sample_id",
        segments: Segments | None = None,
        depth: int = 0,
        features: Callable[[Any], Tensor] | None = None,
        source: SourceOf | None = "source",
        names: NamesOf | None = None,
        families: bool = True,
        loss: LossOfSamples | None = None,
        controls: Iterable[Any] | None = None,
        control_fraction: float | None = None,
        control_every: int = 100,
        flush_every: int = 50,
        new_ledger: bool = False,
    ) -> None:
        self.probe = ControlProbe(controls, control_fraction, control_every)
        self.sample_ids = SampleIds(identity, key, segments)
        self.loader_ids = LoaderIds(self.sample_ids)
        self.probe.overlap = self.loader_ids.overlap
        self.describe = BatchDescription(self.sample_ids, features, source, names)
        self.loss = loss
        self.flush_every = flush_every
        self.new_ledger = new_ledger
        self.table = LossTable(depth)
        self.table.names = self.sample_ids.names
        self.controls = ControlTable()
        self.validation_weights = ValidationWeights()
        self.matching = Matching()
        self.visits = VisitRecorder(self.table, self.matching, self.loader_ids.hosts["train"])
        self.visits.families = FamilyRecord(self.matching.counts) if families else None
        self.capture = StepCapture()
        self.control_capture = EvaluationCapture(self.capture)
        self.evaluation = ControlEvaluation(self)
        self.batch = CurrentBatch()
        self._current: DescribedBatch | None = None
        self._is_same: Tensor | None = None
        self._step = self._since_flush = 0
        self._is_restored = False
        self.warnings = WarningCache()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_support(trainer.strategy, "LossTracker")
            self.capture = StepCapture(pl_module, self.loss)
            self.batch.reader = self.capture.reader
            self.control_capture = EvaluationCapture(self.capture)
            self.probe.attach(trainer)
            self.loader_ids.attach(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.losses, ledger.controls, ledger.batch = self.table, self.controls, self.batch
        ledger.families = self.visits.families
        ledger.close_with(Ledger.controls, self.evaluation.close)
        self.controls.has_own_source = self.probe.has_controls
        self.validation_weights.attach(trainer, self, self.controls, self.control_capture.abandon)
        self.evaluation.attach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        restored, self._is_restored = self._is_restored, False
        if restored and any(gather(self.visits.has_any_before(trainer.current_epoch))):
            self.visits.end_epoch()  # the epoch of the checkpoint had ended, but for its last hook
        ids = self.loader_ids.take(batch, "train")
        if trainer.fit_loop._skip_backward:  # SWA's last epoch, which only updates batch norm, trains on no sample
            ids = None
        self._current = self.describe.of_training(batch, ids, self.loader_ids.axes, self.loader_ids.readable)
        self._is_same = self.loader_ids.is_same
        self._step = trainer.global_step  # the optimizer steps behind this loss; at the end of the batch one too many
        self.batch.ids = self.batch.documents = None
        if self._current is not None:
            self.batch.ids, self.batch.documents = self._current.ids, self.sample_ids.documents
            self.evaluation.note(trainer, batch)
            self.capture.begin(batch, len(self.batch.ids), self.loader_ids.axes, self.describe.is_packed)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._current is not None:
            self.capture.before_backward(loss, loss_scale(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        current, self._current = reported(outputs, self._current), None
        if current is not None:
            captured = self.capture.finish(outputs, len(current.ids))
            if self.capture.attends_across:
                warn_once(self.warnings, ATTENDS_ACROSS)
            if isinstance(captured, NotCaptured):
                self.warn(captured)
                losses, counted = torch.full((len(current.ids),), torch.nan), None
            else:
                self._self_check(captured.explained)
                losses, counted = captured.losses.detach().float(), captured.counted
            may_be_windows = self.describe.may_be_windows(current)
            visit = Visit.of(current, losses, self._step, trainer.current_epoch, counted, may_be_windows)
            self.visits.add(visit, self._is_same)
        self._since_flush += 1
        if self._since_flush >= self.flush_every or self.visits.is_full(self._since_flush, trainer.world_size == 1):
            self._flush(drain=False)
        if self.evaluation.is_due(trainer):
            self.evaluation.run(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loader_ids.clear("train")
        self.capture.abandon()  # a hook of the user's may have skipped the rest of the epoch within a batch
        self.visits.end_epoch()
        if self.evaluation.is_due_at_the_end_of_an_epoch(trainer):
            self.evaluation.run(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation_counts(trainer):
            self._flush()
            self.evaluation.begin(trainer.global_step)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        counts = self._validation_counts(trainer) or trainer.sanity_checking
        ids = self.loader_ids.take(batch, "validate") if counts else None
        self._current = self.describe.of(batch, ids, self.loader_ids.axes, self.loader_ids.readable)
        self._is_same = self.loader_ids.is_same
        if self._current is not None and not trainer.sanity_checking:
            samples = len(self._current.ids)
            self.control_capture.begin(batch, samples, self.loader_ids.axes, self.describe.is_packed)
        self.validation_weights.watch(trainer, pl_module, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        current, self._current = self._current, None
        if self._validation_counts(trainer):
            self.evaluation.add(current, outputs, self._is_same)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loader_ids.clear("validate")
        if self._validation_counts(trainer):
            self.evaluation.close(Ledger.of(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()
        self.visits.beside.settle()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "table": self.table.state_dict(),
            "controls": self.controls.state_dict(),
            **self.visits.state_dict(),
            "validation_weights": self.validation_weights.state_dict(),
            "identity": self.sample_ids.source,
            "overlap": self.loader_ids.overlap.state_dict(),
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.world_size > 1 and state is not None and not trainer.interrupted:  # others may not come then
            self.visits.complete(state)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.new_ledger:
            leave_out(checkpoint, trainer.callbacks)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("LossTracker"):
            self.table.load_state_dict(state_dict["table"])
            self.controls.load_state_dict(state_dict["controls"])
            self.visits.load_state_dict(state_dict)
            self.validation_weights.load_state_dict(state_dict.get("validation_weights", {}))
            self.loader_ids.overlap.load_state_dict(state_dict.get("overlap", {}))
            self._is_restored = True
            self.sample_ids.restore(state_dict.get("identity", "older"))

    def _flush(self, drain: bool = True) -> None:
        self._since_flush = 0
        self.visits.flush(drain)

    def _validation_counts(self, trainer: Trainer) -> bool:
        """Whether the samples of the validation loop that runs now are controls."""
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fits and not self.probe.has_controls and self.validation_weights.records

    def warn(self, refusal: NotCaptured) -> None:
        """Says once why losses could not be read."""
        warn_once(self.warnings, refusal.reason, category=InternalError if refusal.is_internal else UserWarning)

    def _self_check(self, explained: float | None) -> None:
        if explained is not None and abs(explained - 1) > 0.01:
            warn_once(
                self.warnings,
                f"The loss calls seen in training_step explain {explained:.0%} of the loss; the rest (a penalty on "
                "the weights, say) belongs to no sample and is left out of per-sample losses.",
            )

    def _detach(self) -> None:
        self.visits.beside.settle()
        self.evaluation.detach()
        self.validation_weights.detach()
        self.loader_ids.detach()
        self.probe.detach()
        self.capture.abandon()
        self.control_capture.abandon()
        self._current = None
