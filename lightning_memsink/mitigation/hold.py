"""A thermostat for memorization: which samples of a batch are, right now, far below the loss of their controls.

A sample trains as usual until its loss is ``at`` nats below that of held-out samples of equal difficulty. Then its
gradient is left out until forgetting has raised its loss again. Memorization is held at a set point, while the sample
still contributes what it has in common with others. Related: flooding (Ishida et al. 2020), a loss floor that is the
same for easy and hard samples; and RHO-loss (Mindermann et al. 2022), which selects samples by the loss that held-out
data can't reduce.

    B  samples in a batch      M  controls      F  matching features      k  neighbours      N  samples known
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.detection.feature_units import in_units, limit_of, standard_units
from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.matched_controls import DetectionRule


@dataclass(frozen=True)
class Reference:
    """The controls of one evaluation, prepared for a look-up in every step.

    Matching is by features that don't depend on the model, as the detector's is.
    """

    losses: Tensor
    """``[M]`` finite, in nats, at the latest evaluation."""
    points: Tensor
    """``[M, F]`` features in standard units."""
    mean: Tensor
    scale: Tensor
    """``[F]`` both: from features to standard units."""
    k: int
    limit: float
    """Mean distance to k controls beyond which a sample has no match."""
    others: Tensor
    """``[M, k]`` the nearest other controls of each."""

    @classmethod
    def of(cls, features: Tensor, losses: Tensor, k: int = 8, reach: float = 2.0) -> Reference:
        """From all controls' features ``[M, F]`` and losses ``[M]``; those without a finite loss are left out.

        Raises:
            ValueError: there are no features to match on, or fewer controls than the detector needs.
        """
        finite = torch.isfinite(losses)
        needed = DetectionRule(k=k).controls_needed
        if not features.shape[1]:
            raise ValueError(
                "controls and samples have no features to match on, because the batches are not tokens. Pass them: "
                "LossTracker(features=lambda batch: ...), [B, F]"
            )
        if int(finite.sum()) < needed:
            raise ValueError(
                f"{int(finite.sum())} controls have a finite loss, and {needed} are needed. Give the validation loader "
                "more held-out samples of the same kind as the training data"
            )
        units = standard_units(features[finite])
        points = in_units(features[finite], units)
        others, apart = nearest(points, points, k, leave_one_out=True)
        return cls(losses[finite], points, *units, k, float(limit_of(apart, reach)), others)

    def expected(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """For samples with ``features`` ``[B, F]``: the mean loss ``[B]``, in nats, of each sample's k nearest
        controls, and bool ``[B]`` whether these are near enough to be a match."""
        points = in_units(features, (self.mean, self.scale))
        # All distances at once: with so few points, the time of a step depends on the number of operations.
        apart = torch.cdist(points, self.points, compute_mode="donot_use_mm_for_euclid_dist")
        distances, index = apart.topk(self.k, dim=1, largest=False)
        return self.losses[index].mean(1), distances.mean(1) <= self.limit


@dataclass(frozen=True)
class MatchedBatch:
    """The losses that the samples of a batch are compared with."""

    expected: Tensor | None
    """``[B]`` mean loss of each sample's matched controls, in nats; None if no sample can be compared."""
    matched: Tensor | None
    """Bool ``[B]``: whether ``expected`` counts; None as above."""
    unmatched: int
    """Known samples without a matched control."""
    unknown: int
    """Samples that have no row yet: at their first visit."""


def match_batch(reference: Reference | None, features: Tensor, rows: Tensor) -> MatchedBatch:
    """Looks the controls of a batch up.

    Args:
        reference: None where there are too few controls.
        features: ``[N, F]`` of all samples known.
        rows: ``[B]`` each sample's row in ``features``, -1 if it is unknown.
    """
    known = rows >= 0
    unknown = known.tolist().count(False)
    if reference is None or unknown == len(rows) or features.shape[1] != len(reference.mean):
        return MatchedBatch(None, None, len(rows) - unknown, unknown)
    expected, matched = reference.expected(features[rows.clamp(min=0)].float())
    matched &= known
    return MatchedBatch(expected, matched, len(rows) - unknown - matched.tolist().count(True), unknown)


def over_set_point(losses: Tensor, expected: Tensor, matched: Tensor, at: float) -> Tensor:
    """Bool ``[B]``: matched, and the loss is more than ``at`` nats below the expected one. False where a loss is NaN.

    >>> matched = torch.tensor([True, False, True])
    >>> over_set_point(torch.tensor([1.0, 1.0, 3.0]), torch.full((3,), 2.0), matched, at=0.5).tolist()
    [True, False, False]
    """
    return matched & (expected - losses > at)


def hold_weights(losses: Tensor, expected: Tensor, matched: Tensor, at: float) -> Tensor:
    """``[B]`` on the device of ``losses``: 0 for a sample over the set point, 1 for the others.

    Args:
        losses: ``[B]`` in nats.
        expected, matched: ``[B]`` of a `MatchedBatch`, on any device.
        at: the set point in nats, at least 0.
    """
    expected, matched = (each.to(losses.device, non_blocking=True) for each in (expected, matched))
    over = over_set_point(losses, expected, matched, at)
    return torch.where(over, 0.0, 1.0)
