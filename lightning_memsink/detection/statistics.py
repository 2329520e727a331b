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
EVEN_WEIGHT = 0.5
"""Share of a sample's weight among all hypotheses that does not depend on how often it was visited."""


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


def null_share(p: Tensor) -> float:
    """Estimated share, in 0…1, of null hypotheses among those with p-values ``[N]``; 1 without any.

    Storey's estimate (2002, "A direct approach to false discovery rates"): p-values of null hypotheses lie above a
    bound as often as chance has it. With one added to their number, dividing alpha by it keeps the false-discovery rate
    of conformal p-values (Marandon, Lei, Mary & Roquain 2024, "Adaptive novelty detection with false discovery rate
    guarantee"). The bound is the first at which the estimate no longer falls (Liang & Nettleton 2012, "Adaptive and
    dynamic adaptive procedures for false discovery rate control and estimation"), .2 at least: p-values of memorized
    samples may all be about as large as the share of controls that the model happens to know, a tenth with ten classes.

    >>> null_share(torch.tensor([0.001, 0.002, 0.6, 0.9]))
    1.0
    """
    if not len(p):
        return 1.0
    bounds = torch.arange(4, 20, dtype=torch.float64) / 20
    above = len(p) - torch.searchsorted(p.double().sort().values, bounds, right=True)
    shares = (1 + above) / (len(p) * (1 - bounds))
    rises = (shares.diff() >= 0).nonzero()
    last = int(rises[0]) if len(rises) else len(shares) - 1
    return min(1.0, float(shares[last]))


def too_few_together(evaluations: int) -> float:
    """Number of samples flagged at once below which an evaluation is stricter: it grows with the number of these.

    In a clean run each evaluation flags anything with a probability of alpha, and nearly always that is one sample or
    two; many evaluations would accuse in many clean runs. With three flagged at once chance plays no part any more.
    So k samples together are asked for ``alpha * k / few`` where BH asks for alpha, as long as k is below ``few``. The
    false-discovery rate of BH holds, since no bound is larger than its own.
    """
    return 2 + math.log2(1 + max(1, evaluations))


def benjamini_hochberg(p: Tensor, alpha: float, hypotheses: int | None = None, few: float = 1.0) -> Tensor:
    """Bool ``[N]``: rejected at false-discovery rate ``alpha`` (Benjamini & Hochberg 1995).

    Args:
        p: ``[N]`` p-values.
        alpha: rate.
        hypotheses: how many there are, where those beyond ``p`` have p-values of 1; None: N.
        few: up to so many rejections the bound is lower: `too_few_together`.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.02, 0.03, 0.9]), 0.05).tolist()
    [True, True, True, False]
    """
    if not len(p):
        return torch.zeros(0, dtype=torch.bool)
    ranked = p[p <= 2 * alpha].double().sort().values  # no bound is larger than alpha
    rank = torch.arange(1, len(ranked) + 1, dtype=torch.float64)
    bound = alpha * (rank / few).clamp(max=1) * rank / max(len(p), hypotheses or 0)
    below = (ranked <= bound * (1 + 1e-6)).nonzero()  # p-values in single precision may equal the bound
    return p <= ranked[below[-1, 0]].to(p.dtype) if len(below) else torch.zeros_like(p, dtype=torch.bool)


def exposure_weights(exposures: Tensor, of_all: Tensor) -> Tensor:
    """``[N]`` weights of hypotheses, of mean 1 over all samples: half the same for all, half by the number of visits.

    What is seen more often is memorized more often, and the number of visits says nothing on a loss by itself. The
    procedure of Benjamini and Hochberg keeps its rate with any weights that do not depend on the p-values (Genovese,
    Roeder & Wasserman 2006, "False discovery control with p-value weighting", Biometrika 93).

    Args:
        exposures: ``[N]`` visits of the samples.
        of_all: those of all samples that were trained on.
    """
    mean = of_all.double().mean() if len(of_all) else torch.ones((), dtype=torch.float64)
    return EVEN_WEIGHT + (1 - EVEN_WEIGHT) * exposures.double() / mean.clamp(min=1)


def controls_for(samples: int, alpha: float, memorized: int = 1, few: float = 1.0) -> int:
    """Controls needed before ``memorized`` of ``samples`` can be flagged together, with ``few`` as above.

    >>> controls_for(samples=1000, alpha=0.05, memorized=10)
    1999
    """
    return math.ceil(samples / (alpha * memorized * min(1.0, memorized / few)) - 1e-9) - 1


def flagged_together(samples: int, controls: int, alpha: float, few: float = 1.0) -> int:
    """Fewest of ``samples`` that ``controls`` can flag, all together: whose p-values are the smallest possible.

    >>> flagged_together(samples=1000, controls=1999, alpha=0.05)
    10
    """
    many = samples / (alpha * (controls + 1))
    return max(1, math.ceil(max(many, min(few, math.sqrt(few * many))) - 1e-6))


def bits(gap: Tensor, elements: Tensor) -> Tensor:
    """``[N]`` gaps in bits over whole samples, from ``gap`` ``[N]`` in nats per element and counts of ``elements``."""
    return gap * elements / LN2
