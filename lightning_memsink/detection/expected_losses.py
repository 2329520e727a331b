"""The loss to expect of a sample that the model was not trained on: that of controls that are as difficult.

N  samples      M  controls      F  matching features      k  neighbours
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lightning_memsink._chunks import map_in_threads
from lightning_memsink.detection.feature_units import in_units
from lightning_memsink.detection.kd_partition import BoxPrunedSearch, partition
from lightning_memsink.detection.knn import NearestRows, nearest
from lightning_memsink.detection.ridge import Ridge

if TYPE_CHECKING:
    from lightning_memsink.detection.matched_controls import Controls, DetectionRule, SampleFeatures

SCALE_NEIGHBOURS = 4
"""Times k: the nearest controls over which the usual size of a gap is averaged."""


class Comparison(NamedTuple):
    """The comparison of some samples, by `rows`."""

    rows: Tensor
    gap: Tensor
    scale: Tensor
    by_chance: Tensor
    first: Tensor
    distance: Tensor
    """Mean distance to the k matched controls."""


class ExpectedLosses:
    """The loss to expect of a sample from controls that are as difficult.

    Losses of some texts are harder to predict than others, so a score is a gap relative to the usual size of gaps
    nearby. ``null`` and ``null_scale`` ``[M]``: gap of each control to the others, and the usual size of gaps near it.
    """

    def __init__(
        self,
        reference: Controls,
        units: tuple[Tensor, Tensor],
        rule: DetectionRule,
        effect: float,
    ) -> None:
        self.units, self.rule = units, rule
        points = in_units(reference.features, units)
        self.is_flat = not bool((points != points[:1]).any())  # nothing to match on
        self.search = NearestRows(points, SCALE_NEIGHBOURS * rule.k)
        self.ridge = Ridge(points, reference.before, reference.after) if rule.method == "ridge" else None
        self.losses = torch.stack([reference.before, reference.after], 1)
        self.from_training = reference.from_training.float()
        others, _ = nearest(points, points, SCALE_NEIGHBOURS * rule.k, leave_one_out=True)
        self.null = self._null_of(others, reference.after)
        null_size = self.null.abs()
        self.mean_null_size = null_size.mean().clamp(min=1e-9)
        self.local = torch.stack([null_size, (self.null > effect).float()], 1)
        self.null_scale = self._scale(null_size[others].mean(1))

    def _null_of(self, others: Tensor, losses: Tensor) -> Tensor:
        """``[M]`` gaps of controls with these ``losses`` to ``others`` ``[M, k]``."""
        if self.is_flat:
            count = len(losses)
            flat: Tensor = (losses.sum() - losses) / max(1, count - 1) - losses
            return flat
        if self.ridge is not None:
            of_controls: Tensor = self.ridge.expected_of_controls
            return of_controls - losses
        expected: Tensor = self.losses[others[:, : self.rule.k], 1].mean(1)
        return expected - losses

    def _scale(self, usual_size: Tensor) -> Tensor:
        return self.mean_null_size.expand_as(usual_size) * 2 if self.is_flat else usual_size + self.mean_null_size

    def compare(self, samples: SampleFeatures) -> list[Comparison]:
        """Compares the samples, in parts."""

        def points_of(rows: Tensor) -> Tensor:
            return in_units(samples.features[rows], self.units)

        def compare_part(rows: Tensor) -> Comparison:
            points = points_of(rows)
            index, squared = search.query(points)
            matched = index[:, : self.rule.k]
            if self.is_flat:
                before, after = self.losses.mean(0)[:, None].expand(2, len(rows))
            elif self.ridge is None:
                before, after = embedding_bag(matched, self.losses, mode="mean").T
            else:
                before, after = self.ridge.predict(points)
            gaps = torch.lerp(before, after, samples.weight[rows]) - samples.losses[rows]
            usual_size, by_chance = embedding_bag(index, self.local, mode="mean").T
            if self.is_flat:
                by_chance = self.local[:, 1].mean().expand(len(rows))
            first = self.from_training[matched].mean(1)
            return Comparison(
                rows, gaps, self._scale(usual_size), by_chance, first, squared[:, : self.rule.k].sqrt().mean(1)
            )

        parts = partition(torch.arange(len(samples.losses)), points_of)
        search = BoxPrunedSearch(self.search) if len(parts) > 1 else self.search  # few points have a large box
        return map_in_threads(compare_part, parts)
