"""Is a sample memorized? Its loss against held-out controls matched on difficulty.

A low loss alone says nothing: the sample may be easy. A sample is memorized when its loss is far below what
the model makes of *equally difficult text it never trained on*; counterfactual memorization (Feldman & Zhang
2020; Zhang et al. 2023) asks the same of a second model trained without the sample.

    N  samples      M  controls      F  matching features      E  early evaluations      k  neighbours

Losses and gaps are in nats (per token for token losses). Nothing here knows of Lightning or keeps state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lightning_memsink._chunks import in_threads
from lightning_memsink.detection.kd_partition import Around, lots
from lightning_memsink.detection.knn import Neighbours, nearest
from lightning_memsink.detection.ridge import Ridge
from lightning_memsink.detection.statistics import benjamini_hochberg, conformal_p, normal_tail_p, robust_sd

SPREAD = 4
"""Times k: the controls whose own gaps tell what size of gap is usual around a sample."""


@dataclass(frozen=True)
class DetectionRule:
    """When a gap counts.

    ``alpha``: false-discovery rate over samples. ``k``: controls compared with. ``min_gap``: smallest effect in
    nats, and ``null_sds``: in standard deviations of the controls' own gaps; the larger of the two holds.
    ``reach``: a sample farther from its controls than ``reach`` times what 99 % of the controls are from their
    fellows has no match.
    """

    alpha: float = 0.05
    k: int = 8
    method: Literal["knn", "ridge"] = "knn"
    min_gap: float = 1.0
    null_sds: float = 4.0
    reach: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is a false-discovery rate between 0 and 1, but it is {self.alpha}.")
        if self.k < 1:
            raise ValueError(f"k is a number of controls, at least 1, but it is {self.k}.")
        if self.method not in ("knn", "ridge"):
            raise ValueError(f"method is 'knn' or 'ridge', but it is {self.method!r}.")

    @property
    def controls_needed(self) -> int:
        """Fewest controls that can be matched: the neighbours, and fellows for a null distribution."""
        return max(2 * self.k, 16)


@dataclass(frozen=True)
class SampleFeatures:
    """What is known of ``N`` samples to be measured."""

    losses: Tensor
    """``[N]`` at the last visit, finite."""
    weight: Tensor
    """``[N]`` in 0…1: where between the two evaluations of the controls that visit lies (1: at the later)."""
    features: Tensor
    """``[N, F]`` difficulty without asking the model; NaN for unknown, which is matched as average."""
    early: Tensor
    """``[N]`` loss at an early visit, in standard deviations from the controls' mean of that time; NaN for unknown."""
    snapshot: Tensor
    """``[N]`` int64: the row of ``Controls.early`` nearest to that visit."""


@dataclass(frozen=True)
class Controls:
    """What ``M`` held-out samples show."""

    before: Tensor
    """``[M]`` losses at the evaluation before the measured visits."""
    after: Tensor
    """``[M]`` at the one after them; the same as ``before`` if there was just one."""
    features: Tensor
    """``[M, F]``"""
    early: Tensor
    """``[E, M]`` losses at early evaluations, standardized like ``SampleFeatures.early``."""

    def finite(self) -> Controls:
        """Only controls whose losses are finite at both evaluations."""
        return self.only(torch.isfinite(self.before) & torch.isfinite(self.after))

    def only(self, keep: Tensor) -> Controls:
        """Those in ``keep``, bool ``[M]``."""
        return Controls(self.before[keep], self.after[keep], self.features[keep], self.early[:, keep])


@dataclass(frozen=True)
class Measurement:
    """What one evaluation found for ``N`` samples."""

    gap: Tensor
    """``[N]`` expected loss from matched controls minus own loss; positive: lower than they."""
    p: Tensor
    """``[N]`` conformal (or fitted-tail) p-value of the gap, in (0, 1]."""
    matched: Tensor
    """Bool ``[N]``: near enough to controls for a verdict."""
    flagged: Tensor
    """Bool ``[N]``: significant at the false-discovery rate, and large enough."""
    null: Tensor
    """``[M]`` gaps of the controls against their fellows (matched as most samples were)."""
    threshold: float
    tail: str
    """``conformal`` or ``normal``."""

    @property
    def p_floor(self) -> float:
        """Smallest p-value that the controls allow."""
        return 1 / (len(self.null) + 1)


def measure_gaps(samples: SampleFeatures, controls: Controls, rule: DetectionRule) -> Measurement:
    """Gap, p-value and flag of every sample: locally weighted conformal inference (Lei et al. 2018, section 5.2).

    A sample and its controls are compared at the same two moments: early, to find controls that were as difficult,
    and now. At least ``rule.controls_needed`` controls must be finite.
    """
    controls = controls.finite()
    count = len(samples.losses)
    gap, score, p = torch.zeros(count), torch.zeros(count), torch.ones(count)
    matched, beyond = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    units = standard_units(controls.features)
    static = _in_units(controls.features, units)
    limit = float(farthest(static, rule.k, rule.reach))
    nulls = []
    for moment in torch.bincount(samples.snapshot).nonzero().flatten().tolist():
        group = (samples.snapshot == moment).nonzero().flatten()
        against = _Comparison(controls, moment, units, limit, rule)
        against.into(gap, score, matched, samples, group)
        p[group] = conformal_p(score[group], against.null_score)
        beyond[group] = score[group] > against.null_score.max()
        nulls.append((len(group), against.null, against.null_score))
    far = (~matched).nonzero().flatten()
    matched[far] = nearest(_in_units(samples.features[far], units), static, rule.k)[1] <= limit
    _, null, null_score = max(nulls, key=lambda entry: entry[0])
    threshold = max(rule.min_gap, rule.null_sds * robust_sd(null))
    tail, flagged = "conformal", torch.zeros_like(matched)
    flagged[matched] = benjamini_hochberg(p[matched], rule.alpha)
    if (matched & beyond & (gap >= threshold)).any() and not flagged[beyond].any():
        # Farther out than every control, yet the floor 1/(M+1) lets nothing through: a fitted tail, labelled so.
        p, tail = torch.where(beyond, normal_tail_p(score, null_score), p), "normal"
        flagged[matched] = benjamini_hochberg(p[matched], rule.alpha)
    return Measurement(gap, p, matched, flagged & (gap >= threshold), null, threshold, tail)


class _Comparison:
    """The controls as one early moment shows them, ready for samples that have their early loss from it.

    Some texts are harder to foretell than others, so a score is a gap in units of what is usual around it.
    ``null`` and ``null_score`` ``[M]`` are the controls' own, against their fellows.
    """

    def __init__(
        self, controls: Controls, moment: int, units: tuple[Tensor, Tensor], limit: float, rule: DetectionRule
    ) -> None:
        self.controls, self.units, self.limit, self.rule = controls, units, limit, rule
        static = _in_units(controls.features, units)
        own = torch.cat([static, controls.early[moment, :, None].nan_to_num()], 1)
        fellow, _ = nearest(own, own, SPREAD * rule.k, fellows=True)
        self.near = Neighbours(own, SPREAD * rule.k)
        self.ridge = Ridge(own, controls.before, controls.after) if rule.method == "ridge" else None
        near = controls.after[fellow[:, : rule.k]].mean(1)
        self.null = (near if self.ridge is None else self.ridge.expected_of_controls) - controls.after
        self.losses, self.usual = torch.stack([controls.before, controls.after], 1), self.null.abs()
        self.anywhere = self.usual.mean()
        self.null_score = self.null / (self.usual[fellow].mean(1) + self.anywhere)

    def into(self, gap: Tensor, score: Tensor, matched: Tensor, samples: SampleFeatures, group: Tensor) -> None:
        """Compares the samples in ``group`` and fills their rows of ``gap``, ``score`` and ``matched``."""

        def points_of(rows: Tensor) -> Tensor:
            static = _in_units(samples.features[rows], self.units)
            return torch.cat([static, samples.early[rows, None].nan_to_num()], 1)

        def compare(rows: Tensor) -> None:
            points = points_of(rows)
            index, squared = search.of(points)
            near = index[:, : self.rule.k]
            if self.ridge is None:
                before, after = embedding_bag(near, self.losses, mode="mean").T
            else:
                before, after = self.ridge.expected(points)
            own = torch.lerp(before, after, samples.weight[rows]) - samples.losses[rows]
            usual = embedding_bag(index, self.usual[:, None], mode="mean")[:, 0]
            gap[rows], score[rows] = own, own / (usual + self.anywhere)
            # The early loss has no say in what is within reach: memorization that began before it moves it, and would
            # leave a sample without fellows. But who is near with it is nearer without.
            matched[rows] = squared[:, : self.rule.k].sqrt().mean(1) < 0.99 * self.limit

        parts = lots(group, points_of)
        search = Around(self.near) if len(parts) > 1 else self.near  # few points: nothing is far from all of them
        in_threads(parts, compare)


def farthest(own: Tensor, k: int, reach: float) -> Tensor:
    """The mean distance to k controls up to which a sample has a match: see ``DetectionRule.reach``."""
    return reach * nearest(own, own, k, fellows=True)[1].quantile(0.99).clamp(min=1e-6)


def standardize(features: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Both in units of the controls' standard deviation; what is unknown sits at the mean."""
    units = standard_units(own)
    return _in_units(features, units), _in_units(own, units)


def _in_units(features: Tensor, units: tuple[Tensor, Tensor]) -> Tensor:
    mean, scale = units
    return torch.nan_to_num((features - mean) * scale)


def standard_units(own: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal of the standard deviation ``[F]`` of the controls' features; 0 for one that tells nothing."""
    known = torch.where(torch.isfinite(own), own, torch.nan)
    mean = known.nanmean(0)
    spread = (known - mean).square().nanmean(0).sqrt()
    usable = torch.isfinite(mean) & (spread > 1e-9)
    scale = torch.where(usable, 1 / spread.clamp(min=1e-9), 0.0)
    return torch.where(usable, mean, 0.0), scale
