"""One evaluation of the whole run: from the tables to verdicts. Works on live tables and on loaded ones alike."""

from __future__ import annotations

import math

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
from lightning_memsink.detection.statistics import robust_sd
from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable


def evaluate(
    table: LossTable, controls: ControlTable, flags: Flags, rule: DetectionRule, consecutive: int, epoch: int
) -> Evaluation:
    """Measures every sample visited since the evaluation before and updates ``flags`` in place.

    A sample is measured only by losses taken after a training step on it, at its second visit or later: the first
    shows what the model makes of it unseen. Who was not visited since keeps the verdict.
    """
    flags.grow(len(table))
    previous = flags.evaluations[-1].step if flags.evaluations else -1
    visited = torch.isfinite(table.last_loss) & (table.last_step > table.first_step)
    flags.verdict[(table.exposures > 1) & ~torch.isfinite(table.last_loss)] = Verdict.NO_LOSS
    rows = (visited & (table.last_step >= previous)).nonzero().flatten()
    usable = int((torch.isfinite(controls.latest) & torch.isfinite(controls.previous)).sum())
    measurement = None
    if usable < rule.controls_needed:
        flags.verdict[rows] = Verdict.TOO_FEW_CONTROLS
    elif len(rows):
        measurement = measure_gaps(samples_of(table, controls, rows), known_controls(controls), rule)
        _decide(table, controls, flags, rows, measurement, consecutive)
    return _summarize(table, controls, flags, rows, measurement, epoch, usable, rule.alpha)


def known_controls(table: ControlTable) -> Controls:
    """The controls to measure samples by."""
    early = table.standing(table.snapshots, torch.tensor(table.snapshot_steps)[:, None])
    return Controls(table.previous, table.latest, table.features, early)


def samples_of(table: LossTable, controls: ControlTable, rows: Tensor) -> SampleFeatures:
    """What the tables know of the samples in ``rows`` ``[N]``, to be measured against `known_controls`."""
    many = len(rows)
    samples = SampleFeatures(
        losses=table.last_loss[rows],
        weight=torch.empty(many),
        features=torch.empty(many, table.features.shape[1]),
        early=torch.empty(many),
        snapshot=torch.empty(many, dtype=torch.int64),
    )

    def fill(part: slice) -> None:
        at = rows[part]
        steps = table.early_step[at]
        samples.weight[part] = controls.weight_at(table.last_step[at])
        samples.features[part] = table.features[at].float()
        samples.early[part] = controls.standing(table.early_loss[at].float(), steps)
        samples.snapshot[part] = controls.snapshot_of(steps)

    in_blocks(many, fill, 1 << 16)
    return samples


def _decide(
    table: LossTable, controls: ControlTable, flags: Flags, rows: Tensor, found: Measurement, consecutive: int
) -> None:
    flags.gap[rows], flags.p[rows] = found.gap.clamp(-6e4, 6e4).half(), found.p.bfloat16()
    flags.null_gaps = found.null
    streak = torch.where(found.flagged, flags.streak[rows].int() + 1, 0).clamp(max=255)
    stood = flags.verdict[rows] == Verdict.MEMORIZED
    median = controls.latest[torch.isfinite(controls.latest)].median()
    verdict = torch.where(table.last_loss[rows] <= median, int(Verdict.LEARNED), int(Verdict.HARD))
    verdict[found.flagged] = Verdict.WAITING
    verdict[streak >= consecutive] = Verdict.MEMORIZED
    verdict[~found.matched] = Verdict.NO_MATCHED_CONTROLS
    flags.verdict[rows] = verdict.to(torch.uint8)
    # Onset is the first flag of the row of flags that led to a verdict: noted at the first, withdrawn if none follows.
    begins = rows[(streak == 1) & (flags.onset_step[rows] < 0)]
    flags.onset_step[begins] = table.last_step[begins]
    flags.onset_exposures[begins] = table.exposures[begins].clamp(max=32767).short()
    withdrawn = rows[(streak == 0) & ~stood & (flags.streak[rows] < consecutive) & (flags.streak[rows] > 0)]
    flags.onset_step[withdrawn] = flags.onset_exposures[withdrawn] = -1
    flags.streak[rows] = streak.to(torch.uint8)


def _summarize(
    table: LossTable,
    controls: ControlTable,
    flags: Flags,
    rows: Tensor,
    found: Measurement | None,
    epoch: int,
    usable: int,
    alpha: float,
) -> Evaluation:
    null = torch.full((2,), torch.nan) if found is None else found.null
    band = null.nanquantile(torch.tensor([0.025, 0.975]))
    return Evaluation(
        step=controls.latest_step,
        epoch=epoch,
        controls=usable,
        tested=len(rows),
        counts=flags.counts(),
        train_loss=_mean(table.last_loss[rows]),
        control_loss=_mean(controls.latest),
        gap=math.nan if found is None else _mean(found.gap[found.matched]),
        gap_memorized=_mean(flags.gap[flags.memorized].float()),
        null_low=float(band[0]),
        null_high=float(band[1]),
        null_sd=math.nan if found is None else robust_sd(null),
        threshold=math.nan if found is None else found.threshold,
        p_floor=1 / (usable + 1),
        alpha=alpha,
        tail="none" if found is None else found.tail,
    )


def _mean(values: Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
