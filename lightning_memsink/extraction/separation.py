"""How well a score tells members from non-members: AUROC with an interval, TPR at a low FPR.

N  members      M  controls
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Separation:
    """How far scores of suspected texts stand above those of controls, with 95 % intervals."""

    auroc: float
    auroc_low: float
    auroc_high: float
    tpr: float
    """Share of suspected texts above all but ``fpr`` of the controls."""
    fpr: float
    """What was asked for, or, if the controls are too few for that, the least they can tell: 1 by their number."""
    members: int
    controls: int


def separation(members: Tensor, controls: Tensor, fpr: float = 0.01) -> Separation:
    """AUROC and its interval by DeLong et al. 1988 on the logit scale, and the TPR at a low FPR.

    Args:
        members: ``[N]`` scores of suspected texts; what is not finite is left out, here as there.
        controls: ``[M]`` scores of texts that were not trained on.
        fpr: share of controls that may lie above.

    Raises:
        ValueError: fewer than two of either, of which no interval can be had.
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
    asked = max(fpr, 1 / len(controls))
    bar = controls.sort(descending=True).values[int(asked * len(controls) + 1e-9)]
    found = float((members > bar).double().mean())
    return Separation(auroc, low, high, found, asked, len(members), len(controls))


def _interval(auroc: float, variance: float, fewest: int) -> tuple[float, float]:
    """Of 95 %."""
    if auroc in (0.0, 1.0):
        # All lie apart and the variance says nothing; the exact interval of as many successes out of ``fewest`` does.
        reach = 0.025 ** (1 / fewest)
        return (reach, 1.0) if auroc else (0.0, 1 - reach)
    centre, reach = log(auroc / (1 - auroc)), NormalDist().inv_cdf(0.975) * sqrt(variance) / (auroc * (1 - auroc))
    return 1 / (1 + exp(reach - centre)), 1 / (1 + exp(-reach - centre))


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Of ``others``, for each of ``scores``; ties count half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)
    return below / (2 * len(others))
