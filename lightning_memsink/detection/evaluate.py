"""One evaluation of the whole run: from the loss table and the control table to a verdict on every sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink._chunks import in_blocks
from lightning_memsink.detection.matched_controls import (
    Controls,
    DetectionRule,
    Measurement,
    SampleFeatures,
    measure_gaps,
)
from lightning_memsink.detection.statistics import finite_mean, robust_sd
from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable


@dataclass(frozen=True)
class _Cohort:
    """The tables of a run and the samples that one evaluation measures."""

    table: LossTable
    controls: ControlTable
    rows: Tensor
    """``[N]`` rows of ``table``: samples visited since the evaluation before, after a training step on them."""

    @property
    def losses(self) -> Tensor:
        """``[N]`` last losses of the samples."""
        return self.table.last_loss[self.rows]

    @property
    def usable_controls(self) -> int:
        """Controls with finite losses at both of the last two evaluations."""
        return int((torch.isfinite(self.controls.latest) & torch.isfinite(self.controls.previous)).sum())


def evaluate(
    table: LossTable, controls: ControlTable, flags: Flags, rule: DetectionRule, consecutive: int, epoch: int
) -> Evaluation:
    """Measures every sample visited since the evaluation before and updates ``flags`` in place.

    A sample is measured only by losses taken after a training step on it, at its second visit or later: the loss at
    the first visit is the loss of an unseen sample. A sample without a visit since keeps its verdict. Tables of a
    running fit and tables loaded from a file are evaluated alike.

    Args:
        table: losses and matching features of the samples.
        controls: the same of held-out samples.
        flags: the verdicts so far.
        rule: when a gap is flagged.
        consecutive: evaluations in a row that must flag a sample before it is memorized.
        epoch: recorded in the result.
    """
    flags.grow(len(table))
    previous = flags.evaluations[-1].step if flags.evaluations else -1
    visited = torch.isfinite(table.last_loss) & (table.last_step > table.first_step)
    flags.verdict[(table.exposures > 1) & ~torch.isfinite(table.last_loss)] = Verdict.NO_LOSS
    cohort = _Cohort(table, controls, (visited & (table.last_step >= previous)).nonzero().flatten())
    measurement = None
    if cohort.usable_controls < rule.controls_needed:
        flags.verdict[cohort.rows] = Verdict.TOO_FEW_CONTROLS
    elif len(cohort.rows):
        samples = samples_of(table, controls, cohort.rows)
        measurement = measure_gaps(samples, known_controls(controls), rule)
        _update_flags(flags, cohort, measurement, consecutive)
    return _summarize(cohort, flags, measurement, epoch, rule.alpha)


def known_controls(table: ControlTable) -> Controls:
    """The controls of a table, as `measure_gaps` takes them."""
    early = table.standardize(table.snapshots, torch.tensor(table.snapshot_steps)[:, None])
    return Controls(table.previous, table.latest, table.features, early)


def samples_of(table: LossTable, controls: ControlTable, rows: Tensor) -> SampleFeatures:
    """Losses and features of the samples in ``rows`` ``[N]``, to be measured against `known_controls`."""
    count = len(rows)
    samples = SampleFeatures(
        losses=table.last_loss[rows],
        weight=torch.empty(count),
        features=torch.empty(count, table.features.shape[1]),
        early=torch.empty(count),
        snapshot=torch.empty(count, dtype=torch.int64),
    )

    def fill(part: slice) -> None:
        some = rows[part]
        steps = table.early_step[some]
        samples.weight[part] = controls.weight_at(table.last_step[some])
        samples.features[part] = table.features[some].float()
        samples.early[part] = controls.standardize(table.early_loss[some].float(), steps)
        samples.snapshot[part] = controls.snapshot_of(steps)

    in_blocks(count, fill, 1 << 16)
    return samples


def _update_flags(flags: Flags, cohort: _Cohort, measurement: Measurement, consecutive: int) -> None:
    """Writes gaps, p-values, verdicts, streaks and onsets of the measured samples to ``flags``."""
    table, rows, latest = cohort.table, cohort.rows, cohort.controls.latest
    flags.gap[rows], flags.p[rows] = measurement.gap.clamp(-6e4, 6e4).half(), measurement.p.bfloat16()
    flags.null_gaps = measurement.null
    streak = torch.where(measurement.flagged, flags.streak[rows].int() + 1, 0).clamp(max=255)
    was_memorized = flags.verdict[rows] == Verdict.MEMORIZED
    median = latest[torch.isfinite(latest)].median()
    verdict = torch.where(cohort.losses <= median, int(Verdict.LEARNED), int(Verdict.HARD))
    verdict[measurement.flagged] = Verdict.WAITING
    verdict[streak >= consecutive] = Verdict.MEMORIZED
    verdict[~measurement.matched] = Verdict.NO_MATCHED_CONTROLS
    flags.verdict[rows] = verdict.to(torch.uint8)
    # Onset is the first flag of the streak that led to a verdict: written at the first, withdrawn if none follows.
    begins = rows[(streak == 1) & (flags.onset_step[rows] < 0)]
    flags.onset_step[begins] = table.last_step[begins]
    flags.onset_exposures[begins] = table.exposures[begins].clamp(max=32767).short()
    withdrawn = rows[(streak == 0) & ~was_memorized & (flags.streak[rows] < consecutive) & (flags.streak[rows] > 0)]
    flags.onset_step[withdrawn] = flags.onset_exposures[withdrawn] = -1
    flags.streak[rows] = streak.to(torch.uint8)


def _summarize(cohort: _Cohort, flags: Flags, measurement: Measurement | None, epoch: int, alpha: float) -> Evaluation:
    null = torch.full((2,), torch.nan) if measurement is None else measurement.null
    band = null.nanquantile(torch.tensor([0.025, 0.975]))
    usable = cohort.usable_controls
    return Evaluation(
        step=cohort.controls.latest_step,
        epoch=epoch,
        controls=usable,
        tested=len(cohort.rows),
        counts=flags.counts(),
        train_loss=finite_mean(cohort.losses),
        control_loss=finite_mean(cohort.controls.latest),
        gap=math.nan if measurement is None else finite_mean(measurement.gap[measurement.matched]),
        gap_memorized=finite_mean(flags.gap[flags.memorized].float()),
        null_low=float(band[0]),
        null_high=float(band[1]),
        null_sd=math.nan if measurement is None else robust_sd(null),
        threshold=math.nan if measurement is None else measurement.threshold,
        p_floor=1 / (usable + 1),
        alpha=alpha,
        tail="none" if measurement is None else measurement.tail,
    )
