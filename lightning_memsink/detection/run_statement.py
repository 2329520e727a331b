"""What a random sample of a run's samples says of all of them, and what it could have found.

n  samples of the random sample      M  controls
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.exact_bounds import student_quantile
from lightning_memsink.detection.memorized_share import POWER, Scores, lowest_shares, shares_above, smallest_share

MOST_SOURCES = 50
"""Sources with a statement of their own: those with the most samples in the random sample."""
DRAWS, MOST_DRAWN = 400, 4096
"""Of as many control gaps as there are samples, for the interval of their mean; of more, the mean is about normal."""


@dataclass(frozen=True)
class GroupStatement:
    """What the random sample says of one group of samples. The share's interval is one of 95 %."""

    label: str
    samples: int
    """Of the random sample, in this group."""
    share: float
    """Memorized by more than the threshold; NaN where the group has no sample."""
    share_low: float
    share_high: float
    gap: float
    """Their mean gap, less that of controls."""


@dataclass(frozen=True)
class RunStatement:
    """What a random sample says of all samples of a run, as plain numbers. All intervals are of 95 %."""

    samples: int
    """Of the random sample, that were measured."""
    population: int
    """Samples that were trained on so far, which the sample was drawn from."""
    by_second_look: bool
    """Whether they were measured once more, like the controls; otherwise, by the losses of their last visits."""
    share: float
    """Of the population that is memorized by more than the threshold."""
    share_low: float
    share_high: float
    at_least: int
    """So many of the population are memorized by more than the threshold, with a confidence of 95 %."""
    gap: float
    """Mean gap of the population, less that of controls, in the unit of gaps."""
    gap_low: float
    gap_high: float
    detectable_gap: float
    """Smallest gap for which a single sample is called memorized now, with a power of 80 %; infinite where none is."""
    detectable_share: float
    """Smallest share of the population that a sample as large as this shows, likewise; NaN where none would do."""
    by_exposures: list[GroupStatement]
    by_source: list[GroupStatement]

    @staticmethod
    def of(record: Mapping[str, Any]) -> RunStatement:
        """The statement whose ``asdict`` this is. Fields that this version does not know are left out."""
        known = {field.name: record[field.name] for field in fields(RunStatement) if field.name in record}
        groups = {name: [GroupStatement(**group) for group in record[name]] for name in ("by_exposures", "by_source")}
        return RunStatement(**known | groups)


def state_run(
    gap: Tensor,
    scale: Tensor,
    by_chance: Tensor,
    null: Tensor,
    null_scale: Tensor,
    *,
    threshold: float,
    p_needed: float,
    population: int,
    exposures: Tensor,
    source: Tensor | None = None,
    label_of: Callable[[int], str | None] = str,
    by_second_look: bool = True,
) -> RunStatement | None:
    """What a uniform random sample says of the run.

    Args:
        gap: ``[n]`` of each sample: the loss of its matched controls, less its own.
        scale: ``[n]`` usual size of the gaps of controls near it, in the same unit.
        by_chance: ``[n]`` share of the controls near it whose own gap is above ``threshold``, in 0…1.
        null: ``[M]`` gap of each control to the other controls.
        null_scale: ``[M]`` usual size of gaps near each control.
        threshold: a sample with a larger effect is memorized.
        p_needed: the largest p-value at which a single sample would be called memorized now.
        population: samples that this one was drawn from.
        exposures: ``[n]`` visits of each sample.
        source: ``[n]`` the code of each sample's source, below 0 without one; None: there are no sources.
        label_of: the label of a code.
        by_second_look: recorded in the result.

    Returns:
        None if no sample was measured, or if the controls tell nothing: there are fewer than two, or all gaps are
        equal. Samples and controls whose gap or scale is not finite, or whose scale is not above 0, are left out.
    """
    used = torch.isfinite(gap) & torch.isfinite(scale) & (scale > 0)
    usable = torch.isfinite(null) & torch.isfinite(null_scale) & (null_scale > 0)
    gap, scale, null = gap[used].double(), scale[used].double(), null[usable].double()
    if not len(gap) or len(null) < 2 or bool(null.min() == null.max()):
        return None
    chance = by_chance[used].double().nan_to_num(0.0).clamp(0, 1)
    scores = Scores(gap / scale, threshold / scale, null / null_scale[usable].double(), chance)
    everyone = torch.ones((1, len(gap)), dtype=torch.bool)
    visits = _by_exposures(exposures[used])
    sources = [] if source is None else _by_source(source[used], label_of)
    groups = _state_groups(scores, gap - null.mean(), [("", everyone[0]), *visits, *sources])
    mean, mean_low, mean_high = _mean_gap(gap, null, population)
    return RunStatement(
        samples=len(gap),
        population=population,
        by_second_look=by_second_look,
        share=groups[0].share,
        share_low=groups[0].share_low,
        share_high=groups[0].share_high,
        at_least=math.floor(float(lowest_shares(scores, everyone, 0.05)) * population + 1e-9),
        gap=mean,
        gap_low=mean_low,
        gap_high=mean_high,
        detectable_gap=_detectable_gap(scores, scale, threshold, p_needed),
        detectable_share=smallest_share(scores),
        by_exposures=groups[1 : 1 + len(visits)],
        by_source=groups[1 + len(visits) :],
    )


def _mean_gap(gap: Tensor, null: Tensor, population: int) -> tuple[float, float, float]:
    """The mean of ``gap`` ``[n]`` less that of ``null`` ``[M]``, and both ends of its interval.

    The interval holds two. One is Welch's (1947), with the larger of both variances: a few samples of skewed noise show
    too little of it. The other is what the mean noise of as many samples is, drawn from the controls; it is all that
    one sample allows. A single sample of several says nothing of their mean.
    """
    count, controls = len(gap), len(null)
    mean = float(gap.mean() - null.mean())
    if count == 1 < population:
        return mean, -math.inf, math.inf
    low, high = mean, mean
    if count <= MOST_DRAWN:
        generator = torch.Generator().manual_seed(0)
        noise = null[torch.randint(controls, (DRAWS, count), generator=generator)].mean(1) - null.mean()
        drawn_low, drawn_high = noise.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        low, high = mean - drawn_high, mean - drawn_low
    if count > 1:
        of_null = float(null.var()) / controls
        of_gap = max(float(gap.var()), float(null.var())) / count
        freedom = (of_gap + of_null) ** 2 / (of_gap**2 / (count - 1) + of_null**2 / (controls - 1))
        error = student_quantile(math.floor(freedom), 0.025) * math.sqrt(of_gap + of_null)
        low, high = min(low, mean - error), max(high, mean + error)
    return mean, low, high


def _detectable_gap(scores: Scores, scale: Tensor, threshold: float, p_needed: float) -> float:
    """The smallest effect at which the p-value of a sample is ``p_needed`` or less, with a power of 80 %.

    Of a sample whose noise is as that of the controls, and whose scale is the median of ``scale`` ``[n]``.
    """
    controls = len(scores.null)
    may_score_higher = math.floor(p_needed * (controls + 1) + 1e-9) - 1
    if may_score_higher < 0:
        return math.inf
    needed = scores.null.sort().values[max(0, controls - 1 - may_score_higher)]
    return threshold + float(scale.median() * (needed - scores.null.quantile(1 - POWER)).clamp(min=0))


def _state_groups(scores: Scores, gap: Tensor, groups: list[tuple[str, Tensor]]) -> list[GroupStatement]:
    """A statement on each group, given as its label and a mask ``[n]``; ``gap`` ``[n]`` is less the controls' mean."""
    members = torch.stack([mask for _, mask in groups])
    share, low, high = (ends.tolist() for ends in shares_above(scores, members))
    return [
        GroupStatement(label, int(mask.sum()), share[place], low[place], high[place], float(gap[mask].mean()))
        for place, (label, mask) in enumerate(groups)
    ]


def _by_exposures(exposures: Tensor) -> list[tuple[str, Tensor]]:
    """Groups with ``1``, ``2-3``, ``4-7``, … visits, named as the curves ``share/exposures/…`` are."""
    power_of = torch.searchsorted(2 ** torch.arange(1, 31), exposures.long(), right=True)
    return [
        ("1" if power == 0 else f"{2**power}-{2 ** (power + 1) - 1}", power_of == power)
        for power in power_of.unique().tolist()
    ]


def _by_source(source: Tensor, label_of: Callable[[int], str | None]) -> list[tuple[str, Tensor]]:
    """The sources with the most samples; samples without one are left out."""
    codes, counts = source[source >= 0].unique(return_counts=True)
    largest = codes[counts.argsort(descending=True, stable=True)[:MOST_SOURCES]].tolist()
    return [(label_of(code) or str(code), source == code) for code in largest]
