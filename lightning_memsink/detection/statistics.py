"""Conformal p-values, false-discovery control, robust scale.

N  samples      M  controls

Conformal p-values compare a score with the scores of held-out data (Vovk, Gammerman & Shafer 2005, "Algorithmic
Learning in a Random World"). Benjamini-Hochberg controls the false-discovery rate with them, although they share the
held-out data (Bates et al. 2023, "Testing for outliers with conformal p-values", Annals of Statistics 51).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2 = math.log(2)
"""Nats in a bit."""


def conformal_p(scores: Tensor, null: Tensor) -> Tensor:
    """``[N]`` conformal p-values: the share of ``null`` ``[M]`` and the sample itself that is at least as large.

    Ties count against the sample. If score and null are exchangeable, ``P(p <= t) <= t`` for every t (Vovk et al.
    2005; Bates et al. 2023, section 2).
    """
    ranked = null.sort().values
    at_least = len(null) - torch.searchsorted(ranked, scores.contiguous())
    return (1 + at_least.float()) / (len(null) + 1)


def robust_sd(values: Tensor) -> float:
    """Standard deviation without outliers: 1.4826 times the median absolute deviation (Hampel 1974).

    Controls that resemble training text more than their features show have large gaps, too. They belong in the
    p-values, which count them, but a few of them should not widen the unit that effects are measured in.
    """
    return float(1.4826 * (values - values.median()).abs().median())


def finite_mean(values: Tensor) -> float:
    """Mean of the finite ``values``, in their precision; NaN if there is none."""
    finite = values[torch.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def null_share(p: Tensor, beyond: float = 0.5) -> float:
    """Estimated share, in 0…1, of null hypotheses among those with p-values ``[N]``; 1 without any.

    Storey's estimate (2002, "A direct approach to false discovery rates"): p-values of null hypotheses lie above
    ``beyond`` as often as chance has it. With one added to their number, dividing alpha by it keeps the false-discovery
    rate of conformal p-values (Marandon, Lei, Mary & Roquain 2024, "Adaptive novelty detection with false discovery
    rate guarantee").

    >>> null_share(torch.tensor([0.001, 0.002, 0.6, 0.9]))
    1.0
    """
    return min(1.0, float(1 + (p > beyond).sum()) / (len(p) * (1 - beyond))) if len(p) else 1.0


def benjamini_hochberg(p: Tensor, alpha: float, hypotheses: int | None = None) -> Tensor:
    """Bool ``[N]``: rejected at false-discovery rate ``alpha`` (Benjamini & Hochberg 1995).

    ``hypotheses``: how many there are, where those beyond ``p`` have p-values of 1; None: N.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.02, 0.03, 0.9]), 0.05).tolist()
    [True, True, True, False]
    """
    if not len(p):
        return torch.zeros(0, dtype=torch.bool)
    ranked = p[p <= 2 * alpha].double().sort().values  # no bound is larger than alpha
    bound = alpha * torch.arange(1, len(ranked) + 1, dtype=torch.float64) / max(len(p), hypotheses or 0)
    below = (ranked <= bound * (1 + 1e-6)).nonzero()  # p-values in single precision may equal the bound
    return p <= ranked[below[-1, 0]].to(p.dtype) if len(below) else torch.zeros_like(p, dtype=torch.bool)


def controls_for(samples: int, alpha: float, memorized: int = 1) -> int:
    """Controls needed before ``memorized`` of ``samples`` can be flagged together: floor 1/(M+1) <= alpha*k/N.

    >>> controls_for(samples=1000, alpha=0.05, memorized=10)
    1999
    """
    return math.ceil(samples / (alpha * memorized)) - 1


def bits(gap: Tensor, elements: Tensor) -> Tensor:
    """``[N]`` gaps in bits over whole samples, from ``gap`` ``[N]`` in nats per element and counts of ``elements``."""
    return gap * elements / LN2
