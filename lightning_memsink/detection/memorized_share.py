"""Which share of a run's samples is memorized by more than a given gap, from a random sample of them and controls.

n  samples of the random sample      M  controls      G  groups of samples      T  thresholds

A sample's score is its gap divided by the usual size of gaps near it. A score is noise, which controls have too, plus
effect: what training on the sample took off its loss. How both are joined is unknown (the luckiest sample may be the
memorized one), and an effect may be as small as one likes, so the share is known within bounds only, even without any
error of sampling. The intervals hold both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.detection.proportions import beta_quantile, clopper_pearson

ABOVE = (0.5, 0.8, 0.95, 0.99)
"""Quantiles of the controls' scores that thresholds of the lower end are taken from."""
WITHIN = (0.0, 0.5, 1.0)
"""Thresholds of the upper end, in parts of the effect; one more is the lowest fifth of the controls."""
POWER = 0.8


@dataclass(frozen=True)
class Scores:
    """Scores of a random sample and of controls, each in units of the usual size of gaps near it; float64."""

    samples: Tensor
    """``[n]`` gap of each sample, divided by ``scale``."""
    effect: Tensor
    """``[n]`` the effect in question, likewise: a sample with a larger one is memorized."""
    null: Tensor
    """``[M]`` gaps of controls to the other controls, likewise."""
    by_chance: Tensor
    """``[n]`` probability that a sample that was not trained on has a gap above the effect, as controls near it have.
    """

    def thresholds(self) -> Tensor:
        """``[T]`` the quantiles `ABOVE` of the controls' scores: each is the score of a control."""
        count = len(self.null)
        ranks = [min(count - 1, max(0, math.ceil(quantile * count) - 1)) for quantile in ABOVE]
        return self.null.sort().values[ranks]


def shares_above(scores: Scores, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The share of samples whose effect is larger than the one in question, and both ends of its 95 % interval.

    The value is the share of gaps above the effect, less what of them controls have by chance: right where the others'
    effect is zero and the memorized samples' is much larger. The lower end is that of `lowest_shares`, the upper end
    that of `_highest_shares`, or of the value itself, if that is larger.

    Args:
        scores: of samples and of at least one control.
        members: bool ``[G, n]``: the samples of each group, at least one.

    Returns:
        Three of ``[G]``, for each group.
    """
    low, high = lowest_shares(scores, members, 0.025), _highest_shares(scores, members, 0.025)
    sizes = members.sum(1)
    above = _sums(members, scores.samples > scores.effect)
    chance = (_sums(members, scores.by_chance) / sizes).clamp(max=1 - 1e-9)
    share, share_high = ((x - chance) / (1 - chance) for x in (above / sizes, clopper_pearson(above, sizes)[1]))
    high = torch.stack([high, share_high, low]).amax(0).clamp(max=1)
    return torch.minimum(torch.maximum(share, low), high), low, high


def lowest_shares(scores: Scores, members: Tensor, tail: float) -> Tensor:
    """``[G]`` the lower end of each group's share, below which it is with a probability of ``tail`` at most.

    More samples than controls pass a threshold, by an effect that the controls' threshold is lower by: at least the
    difference of both shares has a larger effect, however noise and effect are joined (Makarov 1982; Fan & Park 2010,
    "Sharp bounds on the distribution of treatment effects"). A bound that takes them for independent fails where noise
    decides who is memorized: of random labels, those that the model would have guessed are not. The largest difference
    over `ABOVE` counts, each with a part of ``tail``.
    """
    thresholds = scores.thresholds()
    passing = _sums(members, (scores.samples - scores.effect)[:, None] > thresholds)
    of_null = (scores.null[:, None] > thresholds).sum(0)
    low = _lower_difference(passing, members.sum(1), of_null, len(scores.null), tail / len(thresholds))
    return low.amax(1).clamp(0, 1)


def _highest_shares(scores: Scores, members: Tensor, tail: float) -> Tensor:
    """``[G]`` the upper end, likewise, if training on a sample raises no loss and noise does not depend on the effect.

    Of samples with an effect of d or more, at most as many stay below a threshold t as controls below t - d; of the
    others, at most as many as controls below t. So the more stay below, the fewer are memorized. The least share over
    the thresholds `WITHIN` counts, each with a part of ``tail``.
    """
    effect, ranked = scores.effect, scores.null.sort().values
    middle = float(effect.median())
    ends = torch.tensor([middle * part for part in WITHIN], dtype=torch.float64)
    thresholds = torch.cat([ends, scores.null.quantile(0.2)[None]])
    sizes, below_of_null = members.sum(1), torch.searchsorted(ranked, thresholds, right=True)
    shifted = torch.searchsorted(ranked, thresholds - effect[:, None], right=True)
    window = (below_of_null - _sums(members, shifted) / sizes[:, None]) / len(ranked)
    below = _sums(members, scores.samples[:, None] <= thresholds)
    low = _lower_difference(below, sizes, below_of_null, len(ranked), tail / len(thresholds))
    high = torch.where(window > 1e-9, -low / window.clamp(min=1e-9), torch.inf)
    return high.amin(1).clamp(0, 1)


def smallest_share(scores: Scores) -> float:
    """The smallest share that a random sample as large as this shows with a power of 80 %: its lower end is above 0.

    Of samples whose effect passes every threshold, where the others are as the controls are. NaN where no share would
    do.
    """
    count, thresholds = len(scores.samples), scores.thresholds()
    passing = torch.arange(count + 1, dtype=torch.float64)[:, None].expand(count + 1, len(thresholds))
    of_null = (scores.null[:, None] > thresholds).sum(0)
    sizes = torch.full((count + 1,), count)
    low = _lower_difference(passing, sizes, of_null, len(scores.null), 0.025 / len(thresholds))
    enough = (low > 0).double().argmax(0)
    useful = (low > 0).any(0)
    if not bool(useful.any()):
        return math.nan
    enough, thresholds = enough[useful].double(), thresholds[useful]
    # At this share of passing samples, as many pass with the power: a quantile of the beta distribution.
    needed = beta_quantile(POWER, enough, count - enough + 1)
    shift = scores.effect.quantile(torch.linspace(0.05, 0.95, 10, dtype=torch.float64))
    chance = (scores.null[:, None, None] > thresholds + shift[:, None]).double().mean((0, 1))
    return float(((needed - chance) / (1 - chance)).amin())


def _lower_difference(some: Tensor, sizes: Tensor, others: Tensor, of_others: int, tail: float) -> Tensor:
    """``[G, T]`` the lower end of the difference of two shares, ``some / sizes - others / of_others``.

    From the exact interval of each, joined as Zou & Donner (2008) recover variances from intervals. ``some`` is
    ``[G, T]``, ``sizes`` ``[G]``, ``others`` ``[T]``.
    """
    sizes = sizes[:, None].expand_as(some)
    successes = torch.cat([some.flatten().double(), others.double()])
    trials = torch.cat([sizes.flatten().double(), torch.full(others.shape, float(of_others), dtype=torch.float64)])
    low, high = clopper_pearson(successes, trials, 1 - 2 * tail)
    first, second = some.double() / sizes, others.double() / of_others
    error = (first - low[: some.numel()].view_as(first)).square() + (high[some.numel() :] - second).square()
    return first - second - error.sqrt()


def _sums(members: Tensor, values: Tensor) -> Tensor:
    """``[G, ...]`` sums of ``values`` ``[n, ...]`` over the members of each group, float64."""
    return members.double() @ values.double()
