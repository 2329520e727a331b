"""Evaluations of the controls: their losses are collected and recorded, and then some samples are looked at again."""

from __future__ import annotations

from contextlib import closing
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._distributed import gather
from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.batch_description import BatchDescription
from lightning_memsink.callbacks.runtime.control_messages import not_evaluated
from lightning_memsink.callbacks.runtime.control_probe import ControlProbe
from lightning_memsink.callbacks.runtime.detection_messages import trained_controls
from lightning_memsink.callbacks.runtime.host_copies import HostCopies
from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.callbacks.runtime.second_look import SecondLook
from lightning_memsink.callbacks.runtime.second_look_steps import Mode
from lightning_memsink.callbacks.runtime.validation_weights import ValidationWeights
from lightning_memsink.callbacks.runtime.visit_recorder import VisitRecorder
from lightning_memsink.detection.difficulty import Matching
from lightning_memsink.detection.evaluate import SecondLook as LookedAgain
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.capture import StepCapture, reported
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.losses.loss_units import joint_unit
from lightning_memsink.losses.per_sample import NotCaptured
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.visits import DescribedBatch, elements_of_texts


class Tracker(Protocol):
    """The parts of a `LossTracker` that its evaluations use."""

    sample_ids: SampleIds
    loader_ids: LoaderIds
    table: LossTable
    controls: ControlTable
    probe: ControlProbe
    describe: BatchDescription
    matching: Matching
    visits: VisitRecorder
    capture: StepCapture
    control_capture: EvaluationCapture
    validation_weights: ValidationWeights
    warnings: WarningCache

    def warn(self, refusal: NotCaptured) -> None:
        """Says once why losses could not be read."""


class ControlEvaluation:
    """The evaluations of one `LossTracker`, whose parts it uses."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.second_look: SecondLook | None = None
        self._fit: tuple[Trainer, LightningModule] | None = None
        self._copies = HostCopies()
        self._number = 0  # of evaluations so far

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When fit starts."""
        tracker = self.tracker
        self._fit = trainer, pl_module
        Ledger.of(trainer).look = None
        alone = self.has_first_visits_only(trainer)
        tracker.controls.own_every = tracker.probe.every if alone or tracker.probe.has_controls else None
        tracker.controls.own_samples = 0 if alone else tracker.probe.samples
        if trainer.global_step and not len(tracker.table):  # samples were trained on that nobody has recorded
            tracker.table.begins_with_training = False

    def detach(self) -> None:
        """When fit ends."""
        if self.second_look is not None:
            self.second_look.detach()
        self.second_look = self._fit = None
        self._copies.clear()

    def note(self, trainer: Trainer, batch: Any) -> None:
        """At the start of each training step whose samples are known."""
        look = self._opened(trainer)
        if look is not None:
            look.note(trainer, batch)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether controls that are no validation set are to be evaluated after this step."""
        controls = self.tracker.controls
        return controls.own_every is not None and self.tracker.probe.is_due(trainer.global_step, controls.latest_step)

    def is_due_at_the_end_of_an_epoch(self, trainer: Trainer) -> bool:
        """The same, after the last step of an epoch."""
        controls = self.tracker.controls
        return controls.own_every is not None and controls.latest_step < trainer.global_step

    def has_first_visits_only(self, trainer: Trainer) -> bool:
        """Whether no held-out samples will come, so that the controls are first visits of training samples."""
        return not self.tracker.probe.has_controls and not trainer.enable_validation

    def begin(self, step: int) -> None:
        """When an evaluation begins; of one that was not closed nothing is left."""
        self._copies.clear()
        self._number += 1
        self.tracker.controls.begin(step)

    def add(self, batch: DescribedBatch | None, outputs: Any, is_same: Tensor | None = None) -> None:
        """Adds a batch of controls that a step has run on. ``is_same``: as `VisitRecorder.add` takes."""
        tracker = self.tracker
        batch = reported(outputs, batch)
        if batch is None:
            return
        ids, tokens = batch[:2]
        captured = tracker.control_capture.finish(outputs, len(ids))
        if isinstance(captured, NotCaptured):
            tracker.warn(captured)
            return
        windows = tokens if tracker.describe.may_be_windows(batch) else None
        number = self._number

        def arrive(losses: Tensor, counted: Tensor | None, features: Tensor | None, is_same: Tensor | None) -> None:
            if not tracker.loader_ids.hosts["validate"].admits(is_same):
                return
            elements = None if windows is None else elements_of_texts(windows, counted)

            def add(described: Tensor) -> None:
                if number == self._number:
                    tracker.controls.add(ids, losses, described, elements)

            size = 0 if tokens is None else tokens.ids.numel()
            tracker.visits.beside.put(lambda: tracker.matching.of_controls(ids, tokens, features), add, size)

        self._copies.put(arrive, captured.losses.detach().float(), captured.counted, batch.features, is_same)

    def close(self, ledger: Ledger) -> None:
        """Gathers this evaluation's controls, and looks again at the samples that the detector asks for. Processes wait
        for one another here only: they may have had different numbers of batches. A second call does nothing."""
        tracker = self.tracker
        if not tracker.controls.is_open:
            return
        self._copies.drain()
        tracker.visits.beside.settle()
        tracker.controls.close_evaluation(tracker.validation_weights.gather(tracker.controls.collected))
        if tracker.table.reference_step is None and len(tracker.controls):
            tracker.table.reference_step = tracker.controls.latest_step
        self._leave_out_trained()
        self._look_again(ledger)

    def run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates controls that are no validation set."""
        tracker = self.tracker
        tracker.visits.flush()
        if self.has_first_visits_only(trainer):
            tracker.visits.beside.settle()
            tracker.controls.pass_by(trainer.global_step)
            tracker.table.reference_step = tracker.table.reference_step or trainer.global_step
            self._look_again(Ledger.of(trainer))
            return
        self.begin(trainer.global_step)
        try:
            with closing(
                tracker.probe.evaluate(trainer, pl_module, tracker.control_capture, tracker.describe.of_fetched)
            ) as steps:
                for samples, outputs in steps:
                    self.add(samples, outputs)
        except Exception as error:  # an evaluation must not end the training
            tracker.control_capture.abandon()
            self.begin(trainer.global_step)  # a part of them would be taken for others than before
            warn_once(tracker.warnings, not_evaluated(error))
        self.close(Ledger.of(trainer))

    def _opened(self, trainer: Trainer) -> SecondLook | None:
        """The second look of this fit; None if nothing asks for one."""
        tracker, samples = self.tracker, Ledger.of(trainer).most_nominated
        if self.second_look is None and samples:
            self.second_look = SecondLook(
                tracker.sample_ids, tracker.loader_ids, tracker.table, tracker.control_capture, samples
            )
            self.second_look.attach(trainer)
        return self.second_look

    def _leave_out_trained(self) -> None:
        """Controls that the model was trained on say nothing: their losses count as unknown."""
        tracker, controls = self.tracker, self.tracker.controls
        overlap = tracker.loader_ids.overlap
        overlap.exchange()
        trained = overlap.overlap(controls.ids)
        if tracker.sample_ids.source == "content" and len(tracker.table):
            trained |= tracker.table.index.find(controls.ids) >= 0
        controls.trained = trained
        if bool(trained.any()):
            warn_once(
                tracker.warnings,
                trained_controls(int(trained.sum()), len(trained), DetectionRule().controls_needed),
                key="trained controls",
            )

    def _look_again(self, ledger: Ledger) -> None:
        tracker = self.tracker
        ledger.look = None
        tracker.table.unit = joint_unit(gather(tracker.capture.unit.unit)) or tracker.table.unit
        nominated = ledger.nominated()
        opened = None if self._fit is None else self._opened(self._fit[0])
        if nominated is None or opened is None or self._fit is None or not len(nominated[0]):
            return
        rows, is_random = nominated
        look = opened.measure(*self._fit, rows, self._mode(self._fit[0]))
        if not len(look.rows):
            return
        was_random = torch.zeros(len(tracker.table), dtype=torch.bool)
        was_random[rows] = is_random
        keeps_batches = opened.keeps_batches
        ledger.look = LookedAgain(
            look.rows, look.losses, torch.ones_like(look.rows).bool() if keeps_batches else was_random[look.rows]
        )

    def _mode(self, trainer: Trainer) -> Mode:
        """In which the controls of now were measured."""
        if self.has_first_visits_only(trainer):
            return "training"
        if self.tracker.probe.has_controls or self.tracker.validation_weights.repeats_training_steps:
            return "training_step"
        return "validation_step"
