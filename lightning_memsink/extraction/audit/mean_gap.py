"""The mean gap of a group of texts to comparable controls, with a confidence interval."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_memsink.detection.statistics import LN2

Z_95 = NormalDist().inv_cdf(0.975)
"""Standard errors on either side of a 95 % interval."""


@dataclass(frozen=True)
class MeanGap:
    """``nats`` per token, and its standard ``error``; NaN if there are too few texts."""

    nats: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, nats per token."""
        return self.nats - Z_95 * self.error, self.nats + Z_95 * self.error

    @property
    def bits(self) -> tuple[float, float, float]:
        """The mean and the ends of its interval, bits per token."""
        low, high = self.interval
        return self.nats / LN2, low / LN2, high / LN2


def mean_gap(gap: Tensor, null: Tensor) -> MeanGap:
    """The mean of gaps ``[N]`` minus the mean of the controls' own gaps to other controls ``[M]``.

    The standard error is Welch's. The controls' mean is subtracted because matching is imperfect, and its bias is in
    both.
    """
    gap, null = gap.double(), null.double()
    null = null[null.isfinite()]
    if len(gap) < 2 or len(null) < 2:
        return MeanGap(float(gap.mean() - null.mean()) if len(gap) and len(null) else torch.nan, torch.nan)
    return MeanGap(float(gap.mean() - null.mean()), sqrt(float(gap.var() / len(gap) + null.var() / len(null))))
