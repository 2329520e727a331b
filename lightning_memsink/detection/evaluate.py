"""One evaluation of the whole run: from the loss table and the control table to a verdict on every sample.

It has two stages. All samples visited since the evaluation before are compared with the controls by the loss of their
last visit. Then some are looked at again, in the mode and at the step of the controls, and a verdict ``memorized``
rests on that; only where nothing can be fetched again it rests on the visits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memsink._chunks import in_blocks
from lightning_memsink.detection.control_pool import in_unit, pooled_controls
from lightning_memsink.detection.equal_controls import controls_are_equal
from lightning_memsink.detection.evaluation_summary import Judged, state, summarize
from lightning_memsink.detection.matched_controls import (
    Controls,
    DetectionRule,
    MatchedControls,
    Measurement,
    SampleFeatures,
)
from lightning_memsink.detection.statistics import benjamini_hochberg, exposure_weights, null_share, too_few_together
from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

LEAST_NULL_SHARE = 0.1
"""No smaller share of null hypotheses is believed. The estimate takes their p-values for uniform, but those of samples
that have nothing to memorize because they are easy are small: of labels that half follow a rule, all that follow it."""


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
    step: int
    """Of the evaluation."""
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
    return Visits(table, controls, controls.latest_step, pool, matched, rows, measurement, refusal)


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
    if visits.refusal is not None:
        flags.verdict[rows] = visits.refusal
    by_visits = _Measured(rows, torch.ones_like(rows, dtype=torch.bool), visits.measurement)
    final = by_visits if look is None else _measure_again(visits, look)
    share = 1.0
    if final.by is not None:
        share = null_share(torch.where(final.by.matched, final.by.p, 1.0)[final.is_random])
    level = min(1.0, rule.alpha / max(share, LEAST_NULL_SHARE))
    few = too_few_together(1 + len(flags.evaluations))
    seen = table.exposures[table.exposures > 0]

    def found_in(rows: Tensor, by: Measurement) -> Tensor:
        _note_gaps(flags, rows, by)
        return _discoveries(by, exposure_weights(table.exposures[rows], seen), level, few, population)

    if visits.measurement is not None:
        found = found_in(rows, visits.measurement)
        # A sample is measured once an evaluation: those of the second look by that.
        once = by_visits.is_random if look is None or final.by is None else ~torch.isin(rows, final.rows)
        times, by = table.last_step[rows[once]], visits.measurement.only(once)
        _update(flags, visits, rows[once], times, by, found[once], consecutive, look is None)
    if look is not None and final.by is not None:
        times = torch.full_like(final.rows, visits.step).int()
        found = found_in(final.rows, final.by)
        _update(flags, visits, final.rows, times, final.by, found, consecutive, True)
        flags.looked = final.rows
    basis = by_visits if final.by is None else final
    if basis.by is not None:
        flags.null_gaps = basis.by.null
    judged = Judged(basis.by, basis.rows, basis.is_random, basis is not by_visits, share, level, few)
    statement = state(visits, judged)
    if statement is not None:
        _mark_others(flags, torch.cat([rows, final.rows]).unique(), statement.at_least, rule.effect(table.unit))
    return summarize(visits, flags, judged, statement, epoch, rule)


def samples_of(table: LossTable, controls: ControlTable, rows: Tensor) -> SampleFeatures:
    """Losses and features of the samples in ``rows`` ``[N]``, to be measured against the controls."""
    samples = SampleFeatures(
        losses=in_unit(table.last_loss[rows], table),
        weight=torch.empty(len(rows)),
        features=torch.empty(len(rows), table.features.shape[1]),
    )

    def fill(part: slice) -> None:
        some = rows[part]
        samples.weight[part] = controls.weight_at(table.last_step[some])
        samples.features[part] = table.features[some].float()

    in_blocks(len(rows), fill, 1 << 16)
    return samples


class _Measured(NamedTuple):
    """Samples in the ``rows`` ``[V]`` of the table, whether each was drawn at random, and their measurement, if any."""

    rows: Tensor
    is_random: Tensor
    by: Measurement | None


def _measure_again(visits: Visits, look: SecondLook) -> _Measured:
    """The samples of a second look with a finite loss, compared at the time of the controls."""
    known = torch.isfinite(look.losses)
    rows, losses = look.rows[known], in_unit(look.losses[known].float(), visits.table)
    if visits.matched is None or not len(rows):
        return _Measured(rows, look.is_random[known], None)
    samples = replace(samples_of(visits.table, visits.controls, rows), losses=losses, weight=torch.ones_like(losses))
    return _Measured(rows, look.is_random[known], visits.matched.measure(samples))


def _note_gaps(flags: Flags, rows: Tensor, measured: Measurement) -> None:
    """Writes gaps and p-values; a gap to controls of another kind is none."""
    gap = torch.where(measured.matched, measured.gap, torch.nan)
    flags.gap[rows], flags.p[rows] = gap.clamp(-6e4, 6e4).half(), measured.p.bfloat16()


def _mark_others(flags: Flags, rows: Tensor, at_least: int, effect: float) -> None:
    """Where more samples are memorized than are flagged, those with a gap that counts are undecided.

    They may be the ones: with two classes every second control is known by chance, and no loss tells a sample that is
    known by heart from one that was easy.
    """
    flagged = (flags.verdict == Verdict.MEMORIZED) | (flags.verdict == Verdict.WAITING)
    if at_least <= int(flagged.sum()):
        return
    verdict = flags.verdict[rows]
    may_be = ((verdict == Verdict.LEARNED) | (verdict == Verdict.HARD)) & (flags.gap[rows].float() > effect)
    flags.verdict[rows[may_be]] = int(Verdict.AMONG_MEMORIZED)


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
