"""One evaluation of the whole run: from the loss table and the control table to a verdict on every sample.

It has two stages. All samples visited since the evaluation before are compared with the controls by the loss of their
last visit. Then some are looked at again, in the mode and at the step of the controls, and a verdict ``memorized``
rests on that; only where nothing can be fetched again it rests on the visits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memsink._chunks import in_blocks
from lightning_memsink.detection.control_pool import has_early, held_out_controls, in_unit, pooled_controls
from lightning_memsink.detection.equal_controls import controls_are_equal
from lightning_memsink.detection.evaluation_summary import Judged, summarize
from lightning_memsink.detection.matched_controls import (
    Controls,
    DetectionRule,
    MatchedControls,
    Measurement,
    SampleFeatures,
)
from lightning_memsink.detection.statistics import benjamini_hochberg, null_share, too_few_together
from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

EVEN_WEIGHT = 0.5
"""Share of a sample's weight among all hypotheses that does not depend on how often it was visited."""


class SecondLook(NamedTuple):
    """Losses of some samples, measured again in the mode, the weights and at the step of the controls."""

    rows: Tensor
    """``[V]`` int64, of the loss table; distinct."""
    losses: Tensor
    """``[V]``, NaN where there is none."""
    is_random: Tensor
    """Bool ``[V]``: drawn from all samples, whatever their losses."""


@dataclass(frozen=True)
class Visits:
    """The comparison of an evaluation's samples by their last visits."""

    table: LossTable
    controls: ControlTable
    pool: Controls
    matched: MatchedControls | None
    """The pool, to compare other samples with it; None where it permits no comparison."""
    rows: Tensor
    """``[N]`` rows of ``table``: samples visited since the evaluation before, after a training step on them."""
    measurement: Measurement | None
    """None without samples, or with too few controls, or where their losses are equal."""
    refusal: Verdict | None
    """The verdict on all of them in that case; None without samples."""

    @property
    def losses(self) -> Tensor:
        """``[N]`` last losses of the samples."""
        return self.table.last_loss[self.rows]

    @property
    def population(self) -> int:
        """Samples that were trained on."""
        return int((self.table.exposures > 0).sum())


def evaluate(
    table: LossTable,
    controls: ControlTable,
    flags: Flags,
    rule: DetectionRule,
    consecutive: int,
    epoch: int,
    look: SecondLook | None = None,
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
        consecutive: measurements in a row that must flag a sample before it is memorized.
        epoch: recorded in the result.
        look: losses of a second look, on which verdicts rest then.
    """
    return judge(measure_visits(table, controls, flags, rule), flags, rule, consecutive, epoch, look)


def measure_visits(table: LossTable, controls: ControlTable, flags: Flags, rule: DetectionRule) -> Visits:
    """The first stage: compares the samples visited since the evaluation before with all controls."""
    flags.grow(len(table))
    previous = flags.evaluations[-1].step if flags.evaluations else -1
    visited = torch.isfinite(table.last_loss) & (table.last_step > table.first_step)
    rows = (visited & (table.last_step >= previous)).nonzero().flatten()
    pool = pooled_controls(table, controls, rule).finite()
    refusal = None
    if len(pool) < rule.controls_needed:
        refusal = Verdict.TOO_FEW_CONTROLS
    elif controls_are_equal(pool.after):
        refusal = Verdict.EQUAL_CONTROLS
    matched = None if refusal is not None else MatchedControls(pool, rule, table.unit)
    measurement = matched.measure(samples_of(table, controls, rows)) if matched is not None and len(rows) else None
    return Visits(table, controls, pool, matched, rows, measurement, refusal)


def judge(
    visits: Visits,
    flags: Flags,
    rule: DetectionRule,
    consecutive: int,
    epoch: int,
    look: SecondLook | None = None,
) -> Evaluation:
    """The second stage: verdicts by a second look, or by the visits if there was none."""
    table, rows, population = visits.table, visits.rows, max(1, visits.population)
    flags.verdict[(table.exposures > 1) & ~torch.isfinite(table.last_loss)] = Verdict.NO_LOSS
    looked, is_random, losses = _looked(visits, look)
    final = None
    if visits.refusal is not None:
        flags.verdict[rows] = visits.refusal
    elif look is None:
        final = visits.measurement
    elif len(looked) and visits.matched is not None:
        samples = samples_of(table, visits.controls, looked)
        samples = SampleFeatures(losses, torch.ones_like(losses), samples.features, samples.early, samples.snapshot)
        final = visits.matched.measure(samples)
    share = 1.0
    if final is not None:
        share = null_share(torch.where(final.matched, final.p, 1.0)[is_random])
    level, few = min(1.0, rule.alpha / share), too_few_together(1 + len(flags.evaluations))
    step, seen = visits.controls.latest_step, table.exposures[table.exposures > 0]
    if visits.measurement is not None:
        measured = visits.measurement
        _note_gaps(flags, rows, measured)
        found = _discoveries(measured, exposure_weights(table.exposures[rows], seen), level, few, population)
        again = torch.zeros(len(rows), dtype=torch.bool) if final is None or look is None else torch.isin(rows, looked)
        by_visit = ~again  # a sample is measured once an evaluation: those of the second look by that
        _update(
            flags,
            visits,
            rows[by_visit],
            table.last_step[rows[by_visit]],
            measured.only(by_visit),
            found[by_visit],
            consecutive,
            look is None,
        )
    if final is not None and look is not None:
        _note_gaps(flags, looked, final)
        found = _discoveries(final, exposure_weights(table.exposures[looked], seen), level, few, population)
        _update(flags, visits, looked, torch.full_like(looked, step).int(), final, found, consecutive, True)
        flags.looked = looked
    reference = final or visits.measurement
    if reference is not None:
        flags.null_gaps = reference.null
    by_look = look is not None and final is not None
    judged = Judged(
        reference,
        looked if by_look else rows,
        is_random if by_look else torch.ones_like(rows).bool(),
        by_look,
        share,
        level,
        few,
    )
    return summarize(visits, flags, judged, epoch, rule)


def known_controls(controls: ControlTable, table: LossTable) -> Controls:
    """The held-out samples, as `measure_gaps` takes them."""
    return held_out_controls(controls, table)


def samples_of(table: LossTable, controls: ControlTable, rows: Tensor) -> SampleFeatures:
    """Losses and features of the samples in ``rows`` ``[N]``, to be measured against the controls."""
    count, by_early = len(rows), not table.features.shape[1] and has_early(controls)
    samples = SampleFeatures(
        losses=in_unit(table.last_loss[rows], table),
        weight=torch.empty(count),
        features=torch.empty(count, table.features.shape[1]),
        early=torch.empty(count) if by_early else None,
        snapshot=torch.empty(count, dtype=torch.int64) if by_early else None,
    )

    def fill(part: slice) -> None:
        some = rows[part]
        samples.weight[part] = controls.weight_at(table.last_step[some])
        samples.features[part] = table.features[some].float()
        if samples.early is not None and samples.snapshot is not None:
            steps = table.early_step[some]
            samples.early[part] = controls.standardize(table.early_loss[some].float(), steps)
            samples.snapshot[part] = controls.snapshot_of(steps)

    in_blocks(count, fill, 1 << 16)
    return samples


def _looked(visits: Visits, look: SecondLook | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that a second look measured, whether each was drawn at random, and its loss in the unit of comparison.

    Without a look: the samples of the visits, all taken for drawn at random.
    """
    if look is None:
        return visits.rows, torch.ones(len(visits.rows), dtype=torch.bool), visits.losses
    known = torch.isfinite(look.losses)
    losses = in_unit(look.losses[known].float(), visits.table)
    return look.rows[known], look.is_random[known], losses


def exposure_weights(exposures: Tensor, of_all: Tensor) -> Tensor:
    """``[N]`` weights of hypotheses, of mean 1 over all samples: half the same for all, half by the number of visits.

    What is seen more often is memorized more often, and the number of visits says nothing on a loss by itself. The
    procedure of Benjamini and Hochberg keeps its rate with any weights that do not depend on the p-values (Genovese,
    Roeder & Wasserman 2006, "False discovery control with p-value weighting", Biometrika 93).

    Args:
        exposures: ``[N]`` visits of the samples.
        of_all: those of all samples that were trained on.
    """
    mean = of_all.double().mean() if len(of_all) else torch.ones((), dtype=torch.float64)
    return EVEN_WEIGHT + (1 - EVEN_WEIGHT) * exposures.double() / mean.clamp(min=1)


def _note_gaps(flags: Flags, rows: Tensor, measured: Measurement) -> None:
    """Writes gaps and p-values; a gap to controls of another kind is none."""
    gap = torch.where(measured.matched, measured.gap, torch.nan)
    flags.gap[rows], flags.p[rows] = gap.clamp(-6e4, 6e4).half(), measured.p.bfloat16()


def _discoveries(measured: Measurement, weights: Tensor, level: float, few: float, population: int) -> Tensor:
    """Bool ``[N]``: significant among all samples of the run; those that were not measured have p = 1."""
    weighted = torch.where(measured.matched, measured.p / weights, torch.inf)
    return benjamini_hochberg(weighted, level, population, few) & measured.matched


def _update(
    flags: Flags,
    visits: Visits,
    rows: Tensor,
    times: Tensor,
    measured: Measurement,
    found: Tensor,
    consecutive: int,
    is_final: bool,
) -> None:
    """Writes verdicts, streaks and onsets of the measured samples to ``flags``.

    What only nominates (``is_final`` is False) flags a sample once, at most, and withdraws no verdict.
    """
    table, known = visits.table, flags.streak[rows].int()
    was_memorized = flags.verdict[rows] == Verdict.MEMORIZED
    found = found | (was_memorized & measured.beyond & measured.matched)  # there may be fewer controls than before
    streak = torch.where(found, known + 1, 0).clamp(max=255)
    if not is_final:
        streak = torch.where(found, known.clamp(min=1), known)
    typical = in_unit(table.last_loss[rows], table) <= visits.pool.after.median()
    verdict = torch.where(typical, int(Verdict.LEARNED), int(Verdict.HARD))
    verdict[measured.beyond & ~found] = Verdict.BELOW_FLOOR
    verdict[streak > 0] = Verdict.WAITING
    verdict[(streak >= consecutive) if is_final else was_memorized & (streak > 0)] = Verdict.MEMORIZED
    verdict[~measured.matched] = Verdict.NO_MATCHED_CONTROLS
    flags.verdict[rows] = verdict.to(torch.uint8)
    # Onset is the first flag of the streak that led to a verdict: written at the first, withdrawn if none follows.
    begins = (streak > 0) & (flags.onset_step[rows] < 0)
    flags.onset_step[rows[begins]] = times[begins]
    flags.onset_exposures[rows[begins]] = table.exposures[rows[begins]].clamp(max=32767).short()
    withdrawn = rows[(streak == 0) & ~was_memorized & (known > 0)]
    flags.onset_step[withdrawn] = flags.onset_exposures[withdrawn] = -1
    clear = (streak == 0) & (flags.onset_step[rows] < 0)
    flags.onset_after[rows[clear]] = times[clear]
    flags.streak[rows] = streak.to(torch.uint8)
