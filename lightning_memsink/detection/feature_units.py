"""Matching features in the controls' own units, and how far from its controls a sample may be.

N  samples      M  controls      F  matching features      k  neighbours
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.detection.knn import nearest


def farthest(controls: Tensor, k: int, reach: float) -> Tensor:
    """The mean distance to its k nearest controls up to which a sample is matched; see ``DetectionRule.reach``.

    ``controls`` ``[M, F]``: their standardized features.
    """
    return limit_of(nearest(controls, controls, k, leave_one_out=True)[1], reach)


def limit_of(distances: Tensor, reach: float) -> Tensor:
    """`farthest`, from the mean ``distances`` ``[M]`` of the controls to their own k nearest others."""
    return reach * distances.quantile(0.99).clamp(min=1e-6)


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
