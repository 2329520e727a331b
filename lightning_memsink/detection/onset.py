"""The step at which memorization began, from onsets that are known up to an interval.

A sample's onset lies between two looks: the last that measured it and did not flag it, and the first that did. All
samples that were ever memorized count: of those that are memorized still, the ones that began early are missing.

m  samples with an onset, or flagged and waiting for a verdict      C  bins between the ends of their intervals
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_memsink.detection.verdicts import Flags, Onset, Verdict
from lightning_memsink.samples.loss_table import LossTable

SHARE = 0.1
"""Memorization has set in when this share of the memorized samples is memorized,"""
FEWEST, MOST = 4, 10
"""and at least so many samples, but at most so many: a share of all moves as long as more of them are memorized."""
CLOSED = 9
"""Memorized samples from which on the interval has two ends."""
TAIL = 0.025
FINE, COARSE = 48, 16
"""Ends of intervals that are distinguished: the first ones, where the onset lies, and parts of the rest."""
ITERATIONS = 200
CONVERGED = 0.01
"""Samples that an iteration still moves."""


@dataclass(frozen=True)
class RunOnset(Onset):
    """An onset as `run_onset` follows it over evaluations."""

    reached: int = 0
    """Samples that had been memorized by ``step``, of all ``samples``; 0 if that is not known."""
    settled: bool = True
    """Whether it stays as it is: the estimate agreed with that of the evaluation before."""


@dataclass(frozen=True)
class OnsetTimes:
    """Of each sample with an onset, the interval ``(after, until]`` that it lies in, in steps and in exposures."""

    after: Tensor
    """``[m]`` int64 step of the last look that measured the sample and did not flag it, or of its first visit."""
    until: Tensor
    """``[m]`` int64 step at which it was flagged; `NEVER` where it waits for a verdict, and may have no onset yet."""
    exposures_after: Tensor
    exposures_until: Tensor

    def __len__(self) -> int:
        return len(self.after)

    @property
    def memorized(self) -> int:
        """Samples with an onset."""
        return int((self.until < NEVER).sum())


NEVER = torch.iinfo(torch.int64).max


def run_onset(table: LossTable, flags: Flags, before: Onset | None = None) -> Onset | None:
    """The onset of the run at the last evaluation; None while no sample has been memorized.

    Args:
        table: first visits and sources of the samples.
        flags: the verdicts after that evaluation.
        before: what this function returned at the evaluation before.
    """
    return settle(before, onset_of(onset_times(table, flags), _last_step(flags)))


def settle(before: Onset | None, now: RunOnset | None) -> Onset | None:
    """The onset to go on with, of the estimates ``before`` and ``now`` at two evaluations in a row.

    They agree if the step of each lies in the interval of the other. The later one is then settled, unless its interval
    is open and still gets samples. It stays as it is, so that alert, curves and report show the same numbers, until a
    later interval excludes its step, or is the first with two ends.
    """
    if before is None or now is None:
        return before if now is None else now
    holds = now.step_low <= before.step <= now.step_high
    opened, open_still = before.samples < CLOSED, now.samples < CLOSED
    if is_settled(before):
        return before if holds and (open_still or not opened) else now
    agree = holds and before.step_low <= now.step <= before.step_high
    return replace(now, settled=agree and (not open_still or now.samples == before.samples))


def is_settled(onset: Onset | None) -> bool:
    """Whether an onset is known and stays as it is. One that an older version saved does."""
    return onset is not None and (not isinstance(onset, RunOnset) or onset.settled)


def onset_times(table: LossTable, flags: Flags, rows: Tensor | None = None) -> OnsetTimes:
    """The intervals of all samples that were ever memorized or wait for a verdict, or of those in ``rows``.

    The other samples are not memorized up to the last evaluation: one that was not trained on since its last look can't
    have become so. They are not censored at that look. (In a run of one epoch, which visits most samples once, each of
    the few that are repeated would count for all that are not visited again.)

    Exposures at the last look that did not flag a sample are not recorded; its visits are taken to be evenly spaced.
    """
    rows = (flags.onset_step >= 0).nonzero().flatten() if rows is None else rows[flags.onset_step[rows] >= 0]
    verdict, until = flags.verdict[rows], flags.onset_step[rows].long()
    first = table.first_step[rows].long()
    after = torch.minimum(torch.maximum(flags.onset_after[rows].long(), first), until - 1)
    exposures = flags.onset_exposures[rows].long()
    passed = ((after - first) / (until - first).clamp(min=1)).clamp(0, 1)
    exposures_after = (1 + (exposures - 1) * passed).long().clamp(min=0).minimum(exposures - 1)
    waits = (verdict == Verdict.WAITING) | ((flags.streak[rows] == 1) & (verdict != Verdict.MEMORIZED))
    until, exposures = until.masked_fill(waits, NEVER), exposures.masked_fill(waits, NEVER)
    return OnsetTimes(after, until, exposures_after, exposures)


def onset_of(times: OnsetTimes, last: int) -> RunOnset | None:
    """The step by which a tenth of the samples ever memorized, but at least 4 and at most 10, had become so.

    The estimate is the end of the interval in which the nonparametric maximum-likelihood distribution (Turnbull 1976)
    reaches that number. The 95 % interval holds where these samples are a random draw: their number by the step at
    which as many are expected has a Poisson distribution. (A bootstrap over samples covers 72 to 89 % where 5 to 16 are
    memorized.) It begins where the onsets were at the earliest and ends where they were at the latest. Of fewer than
    four samples it begins at 0, of fewer than nine it ends at ``last``: their number bounds it no better.

    Args:
        times: of all samples that were ever memorized.
        last: step of the last evaluation.

    Returns:
        The estimate, not settled; None if no sample was ever memorized.
    """
    samples = times.memorized
    if not samples:
        return None
    reached = min(samples, max(FEWEST, min(MOST, math.ceil(SHARE * samples))))
    step, low, high = _when(times.after, times.until, reached)
    visits, visits_low, visits_high = _when(times.exposures_after, times.exposures_until, reached)
    most_visits = int(times.exposures_until[times.exposures_until < NEVER].max())
    return RunOnset(
        step=step,
        step_low=max(0, low or 0),
        step_high=max(step, last if high is None else high),
        exposures=float(visits),
        exposures_low=float(visits_low or 0),
        exposures_high=float(most_visits if visits_high is None else visits_high),
        samples=samples,
        reached=reached,
        settled=False,
    )


def _when(after: Tensor, until: Tensor, reached: int) -> tuple[int, int | None, int | None]:
    """When ``reached`` onsets had come: the estimate and the ends of its 95 % interval, None where it is open."""
    ends, mass = turnbull(after, until)
    step = int(ends[int((mass.cumsum(0)[:-1] < reached - 0.5).sum())])
    fewest, too_many = _plausible_counts(reached)
    low = int(after.kthvalue(fewest).values) if fewest else None
    high = int(until.kthvalue(too_many).values) if too_many <= len(until) else NEVER
    return step, None if low is None else min(low, step), None if high == NEVER else max(high, step)


def _plausible_counts(expected: int) -> tuple[int, int]:
    """The lowest count that a Poisson distribution with mean ``expected`` exceeds or equals in 97.5 %, and the lowest
    that it does not reach in 97.5 %.

    >>> _plausible_counts(4), _plausible_counts(10)
    ((1, 9), (4, 18))
    """
    counts = torch.arange(1, 4 * MOST, dtype=torch.float64)
    at_least = torch.special.gammainc(counts, torch.full_like(counts, expected))
    return int((at_least >= 1 - TAIL).sum()), int((at_least > TAIL).sum()) + 1


def turnbull(after: Tensor, until: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution of times in the intervals ``(after, until]`` by self-consistency (Turnbull 1976).

    Args:
        after: ``[m]`` int64.
        until: ``[m]`` int64, `NEVER` where the time lies beyond all that is known.

    Returns:
        ``[C - 1]`` int64 ends of the bins, ascending, and ``[C]`` float64 how many of the m times lie in each; the
        last bin is beyond the last end. Of very many ends, the later ones share bins, and intervals are widened to
        the ends that are left.
    """
    ends = _ends(after, until)
    bins = len(ends) + 1
    first = torch.searchsorted(ends, after, right=True)
    last = torch.where(until == NEVER, len(ends), torch.searchsorted(ends, until))
    counts = torch.bincount(first * bins + last, minlength=bins * bins).double()
    kinds = counts.nonzero().flatten()  # samples are many, but few of their intervals differ
    first, last, counts = kinds // bins, kinds % bins, counts[kinds]
    mass = torch.full((bins,), len(after) / bins, dtype=torch.float64)
    for _ in range(ITERATIONS):
        below = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
        weight = counts / (below[last + 1] - below[first])
        change = mass.new_zeros(bins + 1).index_add_(0, first, weight).index_add_(0, last + 1, -weight)
        before, mass = mass, mass * change.cumsum(0)[:-1]
        if (mass - before).abs().max() < CONVERGED:
            break
    return ends, mass


def _ends(after: Tensor, until: Tensor) -> Tensor:
    """``[C - 1]`` the ends of intervals, ascending: the first ones, and of the later ones a few, with the last."""
    known = until[until < NEVER]
    firsts = [side.topk(min(FINE, len(side)), largest=False).values for side in (after, known)]
    last = known.max()
    begin = torch.stack([some.max() for some in firsts]).min().minimum(last)
    rest = torch.linspace(float(begin), float(last), COARSE, dtype=torch.float64).round().long()
    every = torch.cat([side[:: max(1, len(side) // 4096)] for side in (after, known)]).unique()
    ends: Tensor = torch.cat([*firsts, every if len(every) <= FINE else rest, last[None]]).unique()
    return ends


def _last_step(flags: Flags) -> int:
    return flags.evaluations[-1].step if flags.evaluations else 0
