"""Is a sample memorized? Its loss against held-out controls matched on difficulty.

A low loss alone is no evidence: the sample may be easy. A sample is memorized when its loss is far below the model's
loss on *equally difficult text that it never trained on*. Counterfactual memorization (Feldman & Zhang 2020; Zhang et
al. 2023) makes the same comparison with a second model, trained without the sample.

    N  samples      M  controls      F  matching features      E  early evaluations      k  neighbours

Losses and gaps are in nats (per token for token losses). Nothing here imports Lightning or keeps state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lightning_memsink._chunks import map_in_threads
from lightning_memsink.detection.kd_partition import BoxPrunedSearch, partition
from lightning_memsink.detection.knn import NearestRows, nearest
from lightning_memsink.detection.ridge import Ridge
from lightning_memsink.detection.statistics import benjamini_hochberg, conformal_p, normal_tail_p, robust_sd

SCALE_NEIGHBOURS = 4
"""Times k: the nearest controls over which the usual size of a gap is averaged."""


@dataclass(frozen=True)
class DetectionRule:
    """When a gap is flagged.

    Attributes:
        alpha: false-discovery rate over samples (Benjamini & Hochberg 1995).
        k: number of matched controls that a sample is compared with.
        method: ``knn``: the mean loss of the k nearest controls. ``ridge``: a regression on the same features.
        min_gap: smallest gap, in nats, that is flagged.
        null_sds: the same in standard deviations of the controls' own gaps; the larger of the two applies.
        reach: a sample is unmatched if it is farther from its controls than ``reach`` times the distance within which
            99 % of the controls have their own k nearest other controls.
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
        """Fewest controls that support a verdict: k neighbours, and enough others for a null distribution."""
        return max(2 * self.k, 16)


@dataclass(frozen=True)
class SampleFeatures:
    """Losses and matching features of ``N`` samples to be measured."""

    losses: Tensor
    """``[N]`` at the last visit, finite."""
    weight: Tensor
    """``[N]`` in 0…1: where between the last two evaluations of the controls that visit lies (1: at the later)."""
    features: Tensor
    """``[N, F]`` difficulty, computed without the model; NaN for unknown, which is matched as average."""
    early: Tensor
    """``[N]`` loss at an early visit, in standard deviations from the controls' mean at that time; NaN for unknown."""
    snapshot: Tensor
    """``[N]`` int64: the row of ``Controls.early`` nearest to that visit."""


@dataclass(frozen=True)
class Controls:
    """Losses and matching features of ``M`` held-out samples."""

    before: Tensor
    """``[M]`` losses at the evaluation before the measured visits."""
    after: Tensor
    """``[M]`` losses at the evaluation after them; the same as ``before`` if there was only one evaluation."""
    features: Tensor
    """``[M, F]``"""
    early: Tensor
    """``[E, M]`` losses at early evaluations, standardized like ``SampleFeatures.early``."""

    def finite(self) -> Controls:
        """Only the controls with finite losses at both evaluations."""
        return self.only(torch.isfinite(self.before) & torch.isfinite(self.after))

    def only(self, keep: Tensor) -> Controls:
        """The controls in ``keep``, bool ``[M]``."""
        return Controls(self.before[keep], self.after[keep], self.features[keep], self.early[:, keep])


@dataclass(frozen=True)
class Measurement:
    """The result of one evaluation for ``N`` samples."""

    gap: Tensor
    """``[N]`` expected loss from matched controls minus own loss; positive: lower loss than the controls."""
    p: Tensor
    """``[N]`` conformal (or fitted-tail) p-value of the gap, in (0, 1]."""
    matched: Tensor
    """Bool ``[N]``: near enough to controls for a verdict."""
    flagged: Tensor
    """Bool ``[N]``: significant at the false-discovery rate, and large enough."""
    null: Tensor
    """``[M]`` gap of each control against the other controls (matched at the snapshot of most samples)."""
    threshold: float
    """Smallest gap that is flagged."""
    tail: str
    """How p-values were computed: ``conformal`` or ``normal``."""

    @property
    def p_floor(self) -> float:
        """Smallest p-value that this number of controls allows."""
        return 1 / (len(self.null) + 1)


def measure_gaps(samples: SampleFeatures, controls: Controls, rule: DetectionRule) -> Measurement:
    """Gap, p-value and flag of every sample: locally weighted conformal inference (Lei et al. 2018, section 5.2).

    A sample is compared with its controls at two times: at an early visit, to find controls that were as difficult,
    and at its last visit. At least ``rule.controls_needed`` controls must have finite losses.
    """
    controls = controls.finite()
    count = len(samples.losses)
    gap, score, p = torch.zeros(count), torch.zeros(count), torch.ones(count)
    matched, beyond = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    units = standard_units(controls.features)
    static = in_units(controls.features, units)
    limit = float(farthest(static, rule.k, rule.reach))
    nulls = []
    for snapshot in torch.bincount(samples.snapshot).nonzero().flatten().tolist():
        group = (samples.snapshot == snapshot).nonzero().flatten()
        expectation = _Expectation(controls, snapshot, units, rule)
        for rows, gaps, scores, distances in expectation.compare(samples, group):
            gap[rows], score[rows] = gaps, scores
            # The early loss has no influence on who is matched: memorization that began before that visit changes it,
            # and would leave a sample without controls. But a sample that is near with it is nearer without it.
            matched[rows] = distances < 0.99 * limit
        p[group] = conformal_p(score[group], expectation.null_score)
        beyond[group] = score[group] > expectation.null_score.max()
        nulls.append((len(group), expectation.null, expectation.null_score))
    far = (~matched).nonzero().flatten()
    matched[far] = nearest(in_units(samples.features[far], units), static, rule.k)[1] <= limit
    _, null, null_score = max(nulls, key=lambda entry: entry[0])
    threshold = max(rule.min_gap, rule.null_sds * robust_sd(null))
    tail, flagged = "conformal", torch.zeros_like(matched)
    flagged[matched] = benjamini_hochberg(p[matched], rule.alpha)
    if (matched & beyond & (gap >= threshold)).any() and not flagged[beyond].any():
        # Scores exceed those of every control, but the p-value floor 1/(M+1) permits no flag: fit a tail instead.
        p, tail = torch.where(beyond, normal_tail_p(score, null_score), p), "normal"
        flagged[matched] = benjamini_hochberg(p[matched], rule.alpha)
    return Measurement(gap, p, matched, flagged & (gap >= threshold), null, threshold, tail)


class _Expectation:
    """The loss to expect of a sample from controls that were as difficult at one early evaluation, ``snapshot``.

    Losses of some texts are harder to predict than others, so a score is a gap relative to the usual size of gaps
    among the controls nearby. ``null`` and ``null_score`` ``[M]``: gap and score of each control against the others.
    """

    def __init__(self, controls: Controls, snapshot: int, units: tuple[Tensor, Tensor], rule: DetectionRule) -> None:
        self.units, self.rule = units, rule
        static = in_units(controls.features, units)
        points = torch.cat([static, controls.early[snapshot, :, None].nan_to_num()], 1)
        others, _ = nearest(points, points, SCALE_NEIGHBOURS * rule.k, leave_one_out=True)
        self.search = NearestRows(points, SCALE_NEIGHBOURS * rule.k)
        self.ridge = Ridge(points, controls.before, controls.after) if rule.method == "ridge" else None
        mean_of_others = controls.after[others[:, : rule.k]].mean(1)
        self.null = (mean_of_others if self.ridge is None else self.ridge.expected_of_controls) - controls.after
        self.losses, self.null_size = torch.stack([controls.before, controls.after], 1), self.null.abs()
        self.mean_null_size = self.null_size.mean()
        self.null_score = self.null / (self.null_size[others].mean(1) + self.mean_null_size)

    def compare(self, samples: SampleFeatures, group: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Rows, gaps, scores and mean distances to the k matched controls, of parts of the rows in ``group``."""

        def points_of(rows: Tensor) -> Tensor:
            static = in_units(samples.features[rows], self.units)
            return torch.cat([static, samples.early[rows, None].nan_to_num()], 1)

        def compare_part(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            points = points_of(rows)
            index, squared = search.query(points)
            matched = index[:, : self.rule.k]
            if self.ridge is None:
                before, after = embedding_bag(matched, self.losses, mode="mean").T
            else:
                before, after = self.ridge.predict(points)
            gaps = torch.lerp(before, after, samples.weight[rows]) - samples.losses[rows]
            usual_size = embedding_bag(index, self.null_size[:, None], mode="mean")[:, 0]
            scores = gaps / (usual_size + self.mean_null_size)
            return rows, gaps, scores, squared[:, : self.rule.k].sqrt().mean(1)

        parts = partition(group, points_of)
        search = BoxPrunedSearch(self.search) if len(parts) > 1 else self.search  # few points have a large box
        return map_in_threads(compare_part, parts)


def farthest(controls: Tensor, k: int, reach: float) -> Tensor:
    """The mean distance to its k nearest controls up to which a sample is matched; see ``DetectionRule.reach``.

    ``controls`` ``[M, F]``: their standardized features.
    """
    return reach * nearest(controls, controls, k, leave_one_out=True)[1].quantile(0.99).clamp(min=1e-6)


def standardize(features: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``[N, F]`` and ``[M, F]`` in standard deviations of the controls from their mean; unknown ones are 0."""
    units = standard_units(controls)
    return in_units(features, units), in_units(controls, units)


def in_units(features: Tensor, units: tuple[Tensor, Tensor]) -> Tensor:
    """Features ``[N, F]`` in the `standard_units` of controls; unknown ones are 0, the mean."""
    mean, scale = units
    return torch.nan_to_num((features - mean) * scale)


def standard_units(controls: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal of the standard deviation ``[F]`` of the controls' features ``[M, F]``.

    Both are 0 for a feature that is constant or never finite.
    """
    known = torch.where(torch.isfinite(controls), controls, torch.nan)
    mean = known.nanmean(0)
    deviation = (known - mean).square().nanmean(0).sqrt()
    usable = torch.isfinite(mean) & (deviation > 1e-9)
    scale = torch.where(usable, 1 / deviation.clamp(min=1e-9), 0.0)
    return torch.where(usable, mean, 0.0), scale
