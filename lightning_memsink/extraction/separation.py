"""How well a score separates suspected texts from controls: AUROC with an interval, TPR at a low FPR.

N  suspected texts      M  controls
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Separation:
    """AUROC with its 95 % interval, and the true-positive rate at a false-positive rate."""

    auroc: float
    auroc_low: float
    auroc_high: float
    tpr: float
    """True-positive rate: share of suspected texts above all but ``fpr`` of the controls."""
    fpr: float
    """The requested false-positive rate, but at least 1 / ``controls``, the smallest that they can resolve."""
    members: int
    controls: int


def separation(members: Tensor, controls: Tensor, fpr: float = 0.01) -> Separation:
    """AUROC with its 95 % interval (DeLong et al. 1988, on the logit scale), and the TPR at a low FPR.

    Args:
        members: ``[N]`` scores of suspected texts; values that are not finite are ignored.
        controls: ``[M]`` scores of texts that were not trained on; values that are not finite are ignored.
        fpr: share of controls that may lie above the threshold.

    Raises:
        ValueError: there are fewer than two finite scores of either, so the interval is not defined.
    """
    members, controls = (each[each.isfinite()].double() for each in (members, controls))
    if min(len(members), len(controls)) < 2:
        raise ValueError(
            f"At least 2 suspected texts and 2 controls with a finite score are needed to tell them apart; "
            f"there are {len(members)} and {len(controls)}."
        )
    below = _share_below(members, controls)
    auroc = float(below.mean())
    variance = float(below.var() / len(members) + _share_below(controls, members).var() / len(controls))
    low, high = _interval(auroc, variance, min(len(members), len(controls)))
    fpr = max(fpr, 1 / len(controls))
    threshold = controls.sort(descending=True).values[int(fpr * len(controls) + 1e-9)]
    tpr = float((members > threshold).double().mean())
    return Separation(auroc, low, high, tpr, fpr, len(members), len(controls))


def _interval(auroc: float, variance: float, fewest: int) -> tuple[float, float]:
    """The 95 % interval of an AUROC."""
    if auroc in (0.0, 1.0):
        # Complete separation, where the estimated variance is 0: the exact binomial interval of ``fewest`` successes.
        reach = 0.025 ** (1 / fewest)
        return (reach, 1.0) if auroc else (0.0, 1 - reach)
    centre, reach = log(auroc / (1 - auroc)), NormalDist().inv_cdf(0.975) * sqrt(variance) / (auroc * (1 - auroc))
    return 1 / (1 + exp(reach - centre)), 1 / (1 + exp(-reach - centre))


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """For each of ``scores``, the share of ``others`` below it; ties count half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)
    return below / (2 * len(others))
