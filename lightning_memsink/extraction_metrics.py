"""Extraction and membership as torchmetrics: updated batch by batch, gathered over processes.

B  texts      T  tokens      V  tokens of the vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log, sqrt
from statistics import NormalDist

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import edit_distance

from lightning_memsink.extraction import discoverable, exact_match, longest_run, suffix_log_prob

OfTexts = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From logits ``[B, T, V]``, tokens ``[B, T]`` and a mask ``[B, T]`` or None to a number for each text, ``[B]``."""


class MeanOverTexts(Metric):
    """The mean of what a function of `extraction` or `membership` says of each text; NaN before the first.

    Args:
        of: the function; numbers that are not finite are left out, and counted in ``left_out``.
    """

    full_state_update = False
    total: Tensor
    texts: Tensor
    left_out: Tensor

    def __init__(self, of: OfTexts) -> None:
        super().__init__()
        self.of = of
        for name, kind in (("total", torch.float64), ("texts", torch.int64), ("left_out", torch.int64)):
            self.add_state(name, torch.zeros((), dtype=kind), dist_reduce_fx="sum")

    def update(self, logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> None:
        values = self.of(logits, tokens, mask).double()
        finite = values.isfinite()
        self.total += values[finite].sum()
        self.texts += finite.sum()
        self.left_out += (~finite).sum()

    def compute(self) -> Tensor:
        return self.total / self.texts


def exact_match_rate(prefix: int) -> MeanOverTexts:
    """Share of texts that greedy decoding says word for word after their first ``prefix`` tokens."""
    return MeanOverTexts(lambda logits, tokens, mask: exact_match(logits, tokens, prefix, mask))


def mean_longest_run(prefix: int) -> MeanOverTexts:
    """Tokens in a row, on average."""
    return MeanOverTexts(lambda logits, tokens, mask: longest_run(logits, tokens, prefix, mask))


def discoverable_rate(
    prefix: int, n: int, p: float, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> MeanOverTexts:
    """Share of texts that come at least once in ``n`` sampled tries with probability ``p``."""
    log_prob = partial(suffix_log_prob, temperature=temperature, top_k=top_k, top_p=top_p)
    return MeanOverTexts(lambda logits, tokens, mask: discoverable(log_prob(logits, tokens, prefix, mask), n, p))


def edit_similarity(said: Sequence[str], true: Sequence[str]) -> Tensor:
    """``[B]`` 1 minus the edit distance of two texts by the length of the longer one: 1 if they agree."""
    distance = edit_distance(list(said), list(true), reduction="none")
    longest = torch.tensor([max(len(one), len(other), 1) for one, other in zip(said, true, strict=True)])
    return 1 - distance / longest


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
