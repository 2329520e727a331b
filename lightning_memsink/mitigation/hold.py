"""A thermostat for memorization: which samples of a batch are, right now, far below what their controls have.

A sample trains as usual until its loss is ``at`` nats below that of held-out samples as difficult as it is; then its
gradient is left out until forgetting has brought it back. Memorization is held at a set point, while the sample goes on
teaching what it has in common with others. Relatives: a loss floor, which is the same for easy and hard samples
(flooding, Ishida et al. 2020), and choosing samples by a loss that held-out data could reduce (Mindermann et al. 2022).

    B  samples in a batch      M  controls      F  matching features      k  neighbours
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.detection.matched_controls import DetectionRule, farthest, standard_units


@dataclass(frozen=True)
class Reference:
    """What held-out controls say at one moment, ready for a look-up each step.

    Matching is by the static features alone. The detector matches on an early loss too; a sample that comes often was
    lowered by memorization before the first evaluation, and would be given controls as easy as it has become.
    """

    losses: Tensor
    """``[M]`` finite, at the latest evaluation."""
    points: Tensor
    """``[M, F]`` features in standard units."""
    mean: Tensor
    scale: Tensor
    """``[F]`` both: from features to standard units."""
    k: int
    limit: float
    """Mean distance to k controls beyond which a sample has no match."""

    @classmethod
    def of(cls, features: Tensor, losses: Tensor, k: int = 8, reach: float = 2.0) -> Reference:
        """From all controls' features ``[M, F]`` and losses ``[M]``; those without a finite loss are left out.

        Raises:
            ValueError: there is nothing to match on, or there are fewer controls than the detector would take.
        """
        finite = torch.isfinite(losses)
        needed = DetectionRule(k=k).controls_needed
        if not features.shape[1]:
            raise ValueError(
                "controls and samples have no features to be matched on, for the batches are no tokens. Pass them: "
                "LossTracker(features=lambda batch: ...), [B, F]"
            )
        if int(finite.sum()) < needed:
            raise ValueError(
                f"{int(finite.sum())} controls have a finite loss, and {needed} are needed. Give the validation loader "
                "more held-out samples of the same kind as the training data"
            )
        mean, scale = standard_units(features[finite])
        points = torch.nan_to_num((features[finite] - mean) * scale)
        return cls(losses[finite], points, mean, scale, k, float(farthest(points, k, reach)))

    def expected(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """For samples of ``features`` ``[B, F]``: the mean loss ``[B]`` of the k controls most like each, and whether
        they are near enough to say anything, bool ``[B]``."""
        points = torch.nan_to_num((features - self.mean) * self.scale)
        # Of so few points all distances at once: it is by the number of operations that a step becomes longer.
        apart = torch.cdist(points, self.points, compute_mode="donot_use_mm_for_euclid_dist")
        distances, index = apart.topk(self.k, dim=1, largest=False)
        return self.losses[index].mean(1), distances.mean(1) <= self.limit


def over_set_point(losses: Tensor, expected: Tensor, matched: Tensor, at: float) -> Tensor:
    """Bool ``[B]``: matched, and ``at`` nats below what is expected. A loss that is no number is not held.

    >>> held(torch.tensor([1.0, 1.0, 3.0]), torch.full((3,), 2.0), torch.tensor([True, False, True]), at=0.5).tolist()
    [True, False, False]
    """
    return matched & (expected - losses > at)
