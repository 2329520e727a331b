"""Is a sample memorized? Its loss against held-out controls matched on difficulty.

A low loss alone is no evidence: the sample may be easy. A sample is memorized when its loss is far below the model's
loss on *equally difficult text that it never trained on*. Counterfactual memorization (Feldman & Zhang 2020; Zhang et
al. 2023) makes the same comparison with a second model, trained without the sample.

    N  samples      M  controls      F  matching features      k  neighbours

Losses and gaps are in nats (per token for token losses). Nothing here imports Lightning or keeps state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_memsink.detection.expected_losses import ExpectedLosses
from lightning_memsink.detection.feature_units import farthest, in_units, standard_units
from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.statistics import benjamini_hochberg, conformal_p

MAX_REFERENCE = 4096
"""Controls among which neighbours are searched for. More would make the search slow, and hardly nearer."""
EFFECT = {"nats": 0.3, "ratio": math.log(2)}
"""Smallest gap that counts, by unit: .3 nats; half the loss of the controls."""


@dataclass(frozen=True)
class DetectionRule:
    """When a sample counts as memorized.

    Attributes:
        alpha: false-discovery rate over samples (Benjamini & Hochberg 1995).
        k: number of matched controls that a sample is compared with.
        method: ``knn``: the mean loss of the k nearest controls. ``ridge``: a regression on the same features.
        min_gap: smallest gap that counts: the null hypothesis is a gap of at most this. None: `EFFECT` of the unit.
        reach: a sample is unmatched if it is farther from its controls than ``reach`` times the distance within which
            99 % of the controls have their own k nearest other controls.
    """

    alpha: float = 0.05
    k: int = 8
    method: Literal["knn", "ridge"] = "knn"
    min_gap: float | None = None
    reach: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is a false-discovery rate between 0 and 1, but it is {self.alpha}.")
        if self.k < 1:
            raise ValueError(f"k is a number of controls, at least 1, but it is {self.k}.")
        if self.method not in ("knn", "ridge"):
            raise ValueError(f"method is 'knn' or 'ridge', but it is {self.method!r}.")
        if self.min_gap is not None and not self.min_gap >= 0:
            raise ValueError(f"min_gap is a number of nats, at least 0, but it is {self.min_gap}.")

    @property
    def controls_needed(self) -> int:
        """Fewest controls that support a verdict: k neighbours, and enough others for a null distribution."""
        return max(2 * self.k, 16)

    def effect(self, unit: str = "nats") -> float:
        """Smallest gap that counts, in this unit."""
        return EFFECT["ratio" if unit == "ratio" else "nats"] if self.min_gap is None else self.min_gap


@dataclass(frozen=True)
class SampleFeatures:
    """Losses and matching features of ``N`` samples to be measured."""

    losses: Tensor
    """``[N]`` at the last visit, finite."""
    weight: Tensor
    """``[N]`` in 0…1: where between the last two evaluations of the controls that visit lies (1: at the later)."""
    features: Tensor
    """``[N, F]`` difficulty, computed without the model; NaN for unknown, which is matched as average."""


@dataclass(frozen=True)
class Controls:
    """Losses and matching features of ``M`` controls: samples that the model was not trained on yet."""

    before: Tensor
    """``[M]`` losses at the evaluation before the measured visits."""
    after: Tensor
    """``[M]`` losses at the evaluation after them; the same as ``before`` if there was only one evaluation."""
    features: Tensor
    """``[M, F]``"""
    is_first_visit: Tensor | None = None
    """Bool ``[M]``: the control is a training sample, before it was trained on; None: all are held-out samples."""

    def __len__(self) -> int:
        return len(self.after)

    @property
    def from_training(self) -> Tensor:
        """Bool ``[M]``: `is_first_visit`."""
        return torch.zeros(len(self), dtype=torch.bool) if self.is_first_visit is None else self.is_first_visit

    def finite(self) -> Controls:
        """Only the controls with finite losses at both evaluations."""
        return self.only(torch.isfinite(self.before) & torch.isfinite(self.after))

    def only(self, keep: Tensor) -> Controls:
        """The controls in ``keep``, bool ``[M]`` or positions."""
        return Controls(
            self.before[keep],
            self.after[keep],
            self.features[keep],
            None if self.is_first_visit is None else self.is_first_visit[keep],
        )


@dataclass(frozen=True)
class Measurement:
    """The result of one evaluation for ``N`` samples."""

    gap: Tensor
    """``[N]`` expected loss from matched controls minus own loss; positive: lower loss than the controls."""
    p: Tensor
    """``[N]`` conformal p-value, in (0, 1], of the hypothesis that the gap is at most the effect that counts."""
    matched: Tensor
    """Bool ``[N]``: near enough to controls for a verdict."""
    beyond: Tensor
    """Bool ``[N]``: its score is higher than that of every control."""
    flagged: Tensor
    """Bool ``[N]``: significant at the false-discovery rate among the matched samples."""
    scale: Tensor
    """``[N]`` usual size of gaps there; a score is a gap in this unit."""
    by_chance: Tensor
    """``[N]`` share of the controls nearby whose own gap is above the effect that counts."""
    first_visits: Tensor
    """``[N]`` share of the matched controls that are first visits of training samples."""
    null: Tensor
    """``[M]`` gap of each control against the other controls."""
    null_scale: Tensor
    """``[M]`` usual size of gaps near each control."""
    threshold: float
    """The effect that counts: a gap of at most this is the null hypothesis."""

    def only(self, keep: Tensor) -> Measurement:
        """The measurement of the samples in ``keep``, bool ``[N]``."""
        names = ("gap", "p", "matched", "beyond", "flagged", "scale", "by_chance", "first_visits")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})

    @property
    def p_floor(self) -> float:
        """Smallest p-value that this number of controls allows."""
        return 1 / (len(self.null) + 1)


def measure_gaps(samples: SampleFeatures, controls: Controls, rule: DetectionRule, unit: str = "nats") -> Measurement:
    """Gap and p-value of every sample: `MatchedControls.measure`, of controls that are used once."""
    return MatchedControls(controls, rule, unit).measure(samples)


class MatchedControls:
    """Controls that samples are compared with, those without finite losses left out. Their own gaps are computed once.

    At least ``rule.controls_needed`` controls must have finite losses.
    """

    def __init__(self, controls: Controls, rule: DetectionRule, unit: str = "nats") -> None:
        self.controls, self.rule, self.effect = controls.finite(), rule, rule.effect(unit)
        self._kept = _reference_rows(self.controls)
        self._reference = self.controls.only(self._kept)
        self._units = standard_units(self.controls.features)
        self._static = in_units(self._reference.features, self._units)
        self._limit = float(farthest(self._static, rule.k, rule.reach))
        self._expectation = ExpectedLosses(self._reference, self._units, rule, self.effect)
        self._null, self._null_scale = _null(self.controls, self._kept, self._expectation)

    def measure(self, samples: SampleFeatures) -> Measurement:
        """Gap and p-value of every sample: locally weighted conformal inference (Lei et al. 2018, section 5.2).

        The effect is part of the hypothesis: the score that is ranked among those of the controls is that of the gap
        less the effect.
        """
        rule, count, null, null_scale = self.rule, len(samples.losses), self._null, self._null_scale
        gap, scale, by_chance, first = torch.zeros(4, count).unbind()
        matched = torch.zeros(count).bool()
        for part in self._expectation.compare(samples):
            rows = part.rows
            gap[rows], scale[rows], by_chance[rows], first[rows] = part.gap, part.scale, part.by_chance, part.first
            matched[rows] = part.distance < 0.99 * self._limit
        far = (~matched).nonzero().flatten()  # distances of the search are not exact
        matched[far] = nearest(in_units(samples.features[far], self._units), self._static, rule.k)[1] <= self._limit
        score, null_score = (gap - self.effect) / scale, null / null_scale
        p, beyond = conformal_p(score, null_score), score > null_score.max()
        flagged = torch.zeros_like(matched)
        flagged[matched] = benjamini_hochberg(p[matched], rule.alpha)
        return Measurement(gap, p, matched, beyond, flagged, scale, by_chance, first, null, null_scale, self.effect)


def _reference_rows(controls: Controls) -> Tensor:
    """At most `MAX_REFERENCE` of the controls, among which the neighbours are searched for; held-out ones first, since
    these may be of kinds that first visits are not of, up to half of the places where there are both."""
    if len(controls) <= MAX_REFERENCE:
        return torch.arange(len(controls))
    held_out, first = ((controls.from_training == which).nonzero().flatten() for which in (False, True))
    places = max(MAX_REFERENCE // 2, MAX_REFERENCE - len(first))
    held_out = evenly(held_out, places)
    return torch.cat([held_out, evenly(first, MAX_REFERENCE - len(held_out))])


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows."""
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]


def _null(controls: Controls, kept: Tensor, expectation: ExpectedLosses) -> tuple[Tensor, Tensor]:
    """``[M]`` gap of each control and usual size of gaps near it, those ``kept`` as reference against the others."""
    if len(kept) == len(controls):
        return expectation.null, expectation.null_scale
    samples = SampleFeatures(controls.after, torch.ones(len(controls)), controls.features)
    gap, scale = torch.empty(len(controls)), torch.empty(len(controls))
    for part in expectation.compare(samples):
        gap[part.rows], scale[part.rows] = part.gap, part.scale
    gap[kept], scale[kept] = expectation.null, expectation.null_scale
    return gap, scale
