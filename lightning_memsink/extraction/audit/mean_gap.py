"""How far a group of texts lies below comparable controls, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_memsink.detection.statistics import LN2

CERTAIN = NormalDist().inv_cdf(0.975)
"""Standard errors on either side of a 95 % interval."""


@dataclass(frozen=True)
class MeanGap:
    """``nats`` a token, and the standard ``error`` of that; NaN of fewer texts than it takes."""

    nats: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        return self.nats - CERTAIN * self.error, self.nats + CERTAIN * self.error

    @property
    def bits(self) -> tuple[float, float, float]:
        """The mean and the ends of its interval, in bits a token."""
        low, high = self.interval
        return self.nats / LN2, low / LN2, high / LN2


def mean_gap(gap: Tensor, null: Tensor) -> MeanGap:
    """The mean of gaps ``[N]`` less that of controls against their fellows ``[M]``, by Welch's standard error.

    Less the controls' own, for matching is not perfect and its bias is in both.
    """
    gap, null = gap.double(), null.double()
    null = null[null.isfinite()]
    if len(gap) < 2 or len(null) < 2:
        return MeanGap(float(gap.mean() - null.mean()) if len(gap) and len(null) else torch.nan, torch.nan)
    return MeanGap(float(gap.mean() - null.mean()), sqrt(float(gap.var() / len(gap) + null.var() / len(null))))
