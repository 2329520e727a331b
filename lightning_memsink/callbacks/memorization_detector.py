"""Detects memorized samples and their onset: reads the slots losses and controls, writes flags and onset."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.checkpointing import restoring
from lightning_memsink.callbacks.runtime.detection_messages import (
    DetectionFacts,
    equal_controls,
    start_message,
    too_few_controls,
)
from lightning_memsink.callbacks.runtime.evaluation_schedule import EvaluationSchedule
from lightning_memsink.callbacks.runtime.interrupts import interrupts_deferred
from lightning_memsink.detection.evaluate import Visits, judge, measure_visits
from lightning_memsink.detection.family_verdicts import FamilyVerdicts, judge_families
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.nomination import nominate
from lightning_memsink.detection.onset import RunOnset, run_onset
from lightning_memsink.detection.verdicts import Flags, Onset, Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.loss_table import REMEDY


class MemorizationDetector(Callback):
    """Gives every sample a verdict at each validation: memorized, learned, hard, unseen or undecided.

    Args:
        alpha: false-discovery rate over samples (Benjamini-Hochberg).
        k: controls that a sample is compared with.
        method: ``knn``: the mean of the k nearest controls. ``ridge``: a regression on the same features.
        min_gap: the effect that counts: a sample is memorized if its loss is below that of its controls by more than
            this. None: .3 nats (per token for tokens), or log 2 where losses are no likelihoods (``unit``).
        consecutive: measurements in a row that must flag a sample before it is memorized.
        reach: largest distance of a matched sample from its controls, as a multiple of the distance within which 99 %
            of the controls have their own nearest other controls.
        recheck: samples that are fetched and measured once more at each evaluation, in the mode and at the step of the
            controls: those that look memorized, and a random part of all, from which the report says how much of the
            whole is. 0: verdicts rest on the losses of training.
        unit: ``nats`` for likelihoods; ``ratio`` for losses that are a scale, such as squared errors, which are
            compared by their logarithms. None: by the kind of loss.
        null_sds: without effect; recipes of older versions have it.
    """

    saves_samples = True

    def __init__(
        self,
        alpha: float = 0.05,
        k: int = 8,
        method: Literal["knn", "ridge"] = "knn",
        min_gap: float | None = None,
        consecutive: int = 2,
        reach: float = 2.0,
        recheck: int = 512,
        unit: Literal["nats", "ratio"] | None = None,
        null_sds: float | None = None,
    ) -> None:
        self.rule = DetectionRule(alpha, k, method, min_gap, reach)
        if consecutive < 1:
            raise ValueError(f"consecutive is a number of evaluations, at least 1, but it is {consecutive}.")
        if recheck < 0:
            raise ValueError(f"recheck is a number of samples, at least 0, but it is {recheck}.")
        if unit not in (None, "nats", "ratio"):
            raise ValueError(f"unit is 'nats' or 'ratio', but it is {unit!r}.")
        self.consecutive, self.recheck, self.unit = consecutive, recheck, unit
        self.flags = Flags()
        self.onset: Onset | None = None
        self._visits: Visits | None = None
        self._warnings = WarningCache()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.flags = self.flags
        ledger.onset = self.onset
        if self.recheck:
            ledger.nominate_with(self._nominate, self.recheck)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        ledger.onset = self.onset  # again: FSDP2 restores after on_fit_start
        ledger.require(Ledger.losses, Ledger.controls)
        if len(self.flags.verdict) > len(ledger.losses):
            raise ValueError(
                f"MemorizationDetector resumes with verdicts on {len(self.flags.verdict)} samples, but LossTracker "
                f"has {len(ledger.losses)}: they come from different ledgers. {REMEDY}"
            )
        evaluated = self.flags.evaluations[-1].step if self.flags.evaluations else 0
        if trainer.global_step < evaluated:
            rank_zero_warn(
                f"MemorizationDetector evaluated another run up to step {evaluated}, and this run starts at step "
                f"{trainer.global_step}: no sample is evaluated before this run is past step {evaluated}, and losses "
                "of both runs are in one ledger. Give this run new callbacks: Trainer(callbacks=memsink())."
            )
        self._say_what_can_be_found(trainer, ledger)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            Ledger.of(trainer).close(Ledger.controls)
            self._evaluate(trainer)
            self._log(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Controls other than a validation set are written at the end of a step. No callback writes a slot in this hook
        # of the next step, and mitigations read flags in another hook.
        if self._evaluate(trainer):
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer)

    def _nominate(self, ledger: Ledger) -> tuple[Tensor, Tensor]:
        """Which samples are to be looked at again, now that the controls are measured: rows of the table, and whether
        each was drawn at random."""
        nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
        if not self._is_due(ledger):
            return nothing
        visits = self._measure(ledger)
        return nothing if visits.refusal is not None else nominate(visits, self.flags, self.recheck)

    def _is_due(self, ledger: Ledger) -> bool:
        """Whether the controls were measured since the last evaluation."""
        evaluated = self.flags.evaluations[-1].step if self.flags.evaluations else -1
        return ledger.controls.latest_step > evaluated

    def _measure(self, ledger: Ledger) -> Visits:
        """The comparison of this evaluation's visits, made once."""
        if self._visits is None or self._visits.step != ledger.controls.latest_step:
            if self.unit is not None:
                ledger.losses.unit = self.unit
            record = ledger.get(Ledger.families)
            if record is not None:  # near-duplicates are no naive first visits
                ledger.losses.write("family", torch.arange(len(ledger.losses)), record.numbers(len(ledger.losses)))
            self._visits = measure_visits(ledger.losses, ledger.controls, self.flags, self.rule)
        return self._visits

    def _evaluate(self, trainer: Trainer) -> bool:
        """Evaluates all samples if the controls were measured since the last evaluation; whether they were."""
        ledger = Ledger.of(trainer)
        if not self._is_due(ledger):
            return False
        evaluated = self.flags.evaluations[-1].step if self.flags.evaluations else -1
        visits, look = self._measure(ledger), ledger.get(Ledger.look)
        with interrupts_deferred():
            evaluation = judge(visits, self.flags, self.rule, self.consecutive, trainer.current_epoch, look)
            self._judge_families(ledger, evaluated, visits)
            self.flags.evaluations.append(evaluation)
        self._visits = None
        if visits.refusal is Verdict.TOO_FEW_CONTROLS:
            warn_once(self._warnings, too_few_controls(len(visits.pool), self.rule.controls_needed), key="too few")
        if visits.refusal is Verdict.EQUAL_CONTROLS:
            warn_once(self._warnings, equal_controls(len(visits.pool), float(visits.pool.after.median())), key="equal")
        ledger.onset = self.onset = run_onset(ledger.losses, self.flags, self.onset)
        return True

    def _judge_families(self, ledger: Ledger, since: int, visits: Visits) -> None:
        """Judges the families; nothing where none are looked for.

        ``since``: step of the evaluation before. ``visits``: of this one.
        """
        record, table = ledger.get(Ledger.families), ledger.losses
        if record is None:
            return
        family = table.family
        self.flags.families = judge_families(
            table,
            ledger.controls,
            family.long(),
            record.features,
            self.flags.families or FamilyVerdicts.none(),
            self.rule,
            self.consecutive,
            since,
            visits.matched,
        )

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the last evaluation to Lightning's monitors.

        A monitor must exist and be finite from the first validation on, or ModelCheckpoint and EarlyStopping end the
        run: 0 where nothing was evaluated yet. LiveCurves logs the true value. All processes have the same value, which
        equals their mean.
        """
        last = self.flags.evaluations[-1] if self.flags.evaluations else None
        for name, value, on_bar in (
            ("memorized", 0.0 if last is None else float(last.memorized), True),
            ("flagged_fraction", 0.0 if last is None else last.flagged_fraction, False),
            ("gap", 0.0 if last is None else last.gap, True),
        ):
            finite = value if math.isfinite(value) else 0.0
            pl_module.log(f"memsink/{name}", finite, prog_bar=on_bar, logger=False, sync_dist=trainer.world_size > 1)

    def state_dict(self) -> dict[str, Any]:
        families = self.flags.families
        return {
            "flags": self.flags.state_dict(),
            "onset": None if self.onset is None else asdict(self.onset),
            **({} if families is None else {"families": families.state_dict()}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with restoring("MemorizationDetector"):
            self.flags.load_state_dict(state_dict["flags"])
            self.onset = None if state_dict["onset"] is None else RunOnset(**state_dict["onset"])
            families = state_dict.get("families")
            self.flags.families = None if families is None else FamilyVerdicts.from_state(families)

    def _say_what_can_be_found(self, trainer: Trainer, ledger: Ledger) -> None:
        controls = ledger.controls
        has_validation = controls.own_every is None
        facts = DetectionFacts(
            samples=dataset_size(trainer.train_dataloader),
            held_out=dataset_size(trainer.val_dataloaders or []) if has_validation else controls.own_samples,
            schedule=EvaluationSchedule.of(trainer, controls.own_every),
            consecutive=self.consecutive,
            alpha=self.rule.alpha,
            controls_needed=self.rule.controls_needed,
            recheck=self.recheck,
            takes_first_visits=ledger.losses.begins_with_training,
            evaluated=len(self.flags.evaluations),
        )
        message, is_warning = start_message(facts)
        (rank_zero_warn if is_warning else rank_zero_info)(message)


def dataset_size(loaders: Any) -> int | None:
    """Number of samples in a loader or a list of loaders; None if a data set has no length."""
    flat = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    datasets = [getattr(loader, "dataset", None) for loader in flat]
    sizes = [len(dataset) for dataset in datasets if isinstance(dataset, Sized)]
    return sum(sizes) if len(sizes) == len(flat) else None
