"""Evaluates held-out samples outside the training loop, without side effects on the run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink._evaluation import run_training_step, without_trace
from lightning_memsink.callbacks.runtime.fetched_batches import inputs_of
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.samples.batch import batch_size
from lightning_memsink.samples.batch_rows import Axes
from lightning_memsink.samples.control_overlap import ControlOverlap
from lightning_memsink.samples.dataloader_ids import is_taggable, tag_loader, untag_loader
from lightning_memsink.samples.holdout import holdout_split
from lightning_memsink.samples.tagged_batch import Fetched
from lightning_memsink.samples.visits import DescribedBatch


class ControlProbe:
    """Controls that are no validation set: a loader the user names, or a share split off the training set.

    Args:
        loader: held-out samples, in batches that training_step understands.
        fraction: the share of the training set to hold out instead.
        every: optimizer steps between two evaluations.

    Raises:
        ValueError: for both at once.
    """

    def __init__(self, loader: Iterable[Any] | None, fraction: float | None, every: int) -> None:
        if loader is not None and fraction is not None:
            raise ValueError("LossTracker takes controls=loader or control_fraction=share, not both: drop one of them.")
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(
                f"control_fraction is a share of the training set between 0 and 1, but it is {fraction}. "
                "With 0.1, a tenth of the samples is held out of training."
            )
        self.loader = loader
        self.fraction = fraction
        self.every = every
        self._source: Any = None
        self._view: Any = None  # of the loader, kept as long as its workers may be
        self._next: Fetched | None = None
        self.overlap: ControlOverlap | None = None
        """Gets the inputs of these controls."""
        self.fetched = Fetched()
        """What is known of the samples of the batch yielded last, for `SampleIds.of`."""

    @property
    def axes(self) -> Axes | None:
        """Of the batch yielded last, where its samples lie in each tensor, for `samples.batch_rows.rows_of`."""
        return self.fetched.axes

    @property
    def has_controls(self) -> bool:
        """Whether there are such controls, so that the validation set is not used."""
        return self.loader is not None or self.fraction is not None

    @property
    def samples(self) -> int | None:
        """How many there are; None where that is unknown."""
        dataset = getattr(self.loader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) else None

    def is_due(self, step: int, last: int) -> bool:
        """Whether an evaluation is due at ``step``, if the last one was at step ``last``."""
        return step % self.every == 0 and step > max(0, last)

    def attach(self, trainer: Trainer) -> None:
        """Splits the training loader when Lightning asks for it."""
        if not self.has_controls:
            return
        if not trainer.lightning_module.automatic_optimization:
            raise ValueError(
                "LossTracker evaluates its own controls by calling training_step, which trains under manual "
                "optimization. Pass the held-out samples as the validation loader instead."
            )
        if self.fraction is None or self._source is not None:
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"control_fraction splits the data of one process, but this Trainer has {trainer.world_size}. "
                "Hold the controls out yourself and pass them as the validation loader."
            )
        source = self._source = trainer.fit_loop._data_source
        whole = source.dataloader

        def without_controls() -> Any:
            kept, self.loader = holdout_split(whole(), self.fraction or 0.0)
            return kept

        vars(source)["dataloader"] = without_controls

    def detach(self) -> None:
        """Restores the loaders."""
        untag_loader(self._view)
        self._view = None
        if self._source is not None:
            vars(self._source).pop("dataloader", None)
            self._source = self.loader = None

    def evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        capture: EvaluationCapture,
        described: Callable[[Any, Tensor | None, Fetched], tuple[DescribedBatch | None, Axes | None, bool]],
    ) -> Generator[tuple[DescribedBatch | None, Any]]:
        """Yields each batch of controls, and what training_step returned for it.

        ``described`` gets a batch, its samples' rows in the data set, and what else the loader says of it; it returns
        the samples, where they lie in the batch's tensors, and whether rows hold several of them. Where the loader has
        no rows, samples are numbered as they come; None where the batch doesn't show how many there are.
        """
        if self._view is None:
            self._view = tag_loader(self.loader, self._on_fetch) if is_taggable(self.loader) else self.loader
        start = 0
        with without_trace(pl_module):
            for n, batch in enumerate(() if self._view is None else self._view):  # a loader of a stream has no length
                if batch is None:  # no step to Lightning either
                    continue
                self.fetched, self._next = self._next or Fetched(), None
                rows = self.fetched.ids
                size = batch_size(batch, self.fetched.rows if rows is None else len(rows), self.axes)
                if rows is None and size is not None and not self.fetched.refusal:
                    rows = torch.arange(start, start + size)
                inputs = None if self.overlap is None or not size else inputs_of(batch, self.fetched, size, True)
                batch = trainer.strategy.batch_to_device(batch)
                samples, axes, is_packed = described(batch, rows, self.fetched)
                if self.overlap is not None and samples is not None and inputs is not None and not is_packed:
                    self.overlap.note_controls(samples.ids, inputs)
                capture.begin(batch, 0 if samples is None else len(samples.ids), axes, is_packed)
                outputs = run_training_step(trainer, pl_module, batch, n)
                yield samples, outputs
                start += size or 0

    def _on_fetch(self, batches: object, batch: Any, fetched: Fetched | None) -> None:
        self._next = fetched
