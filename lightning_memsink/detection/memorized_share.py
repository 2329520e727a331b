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

from lightning_memsink.detection.exact_bounds import beta_quantile, lower_bound, student_quantile, upper_bound

ABOVE = (0.4, 0.5, 0.8, 0.95, 0.99)
"""Quantiles of the controls' scores that thresholds of the lower end are taken from."""
WITHIN = (0.0, 0.5, 1.0)
"""Thresholds of the upper end, in parts of the effect; one more is the lowest fifth of the controls."""
SMALLER, LARGER = (0.0, 0.25, 0.5, 0.75, 0.95), (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 64.0)
"""Parts of the effect that samples may have which are not memorized, and which are."""
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
        members: bool ``[G, n]``, dense or sparse: the samples of each group, at least one.

    Returns:
        Three of ``[G]``, for each group.
    """
    low, high = lowest_shares(scores, members, 0.025), _highest_shares(scores, members, 0.025)
    sizes = _sizes(members)
    above = _sums(members, scores.samples > scores.effect)
    chance = (_sums(members, scores.by_chance) / sizes).clamp(max=1 - 1e-9)
    above_high = [upper_bound(int(k), n, 0.025) for k, n in zip(above.tolist(), sizes.tolist(), strict=True)]
    of_gaps = torch.stack([above / sizes, torch.tensor(above_high, dtype=torch.float64)])
    share, share_high = (of_gaps - chance) / (1 - chance)
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
    low = _lower_difference(passing, _sizes(members), of_null, len(scores.null), tail / len(thresholds))
    return low.amax(1).clamp(0, 1)


def _highest_shares(scores: Scores, members: Tensor, tail: float) -> Tensor:
    """``[G]`` the upper end, likewise, if training on a sample raises no loss and noise does not depend on the effect.

    A function of the score whose mean is at least 1 over samples with an effect of d or more, and at least 0 over
    others, whatever their effects are: its mean over all is at least the share. It counts those that pass a threshold,
    less what of the others passes it, and counts as one those far beyond it. The least mean over the thresholds
    `WITHIN` counts, each with Student's interval and a part of ``tail``. All, of fewer than two samples.
    """
    ranked, middle = scores.null.sort().values, float(scores.effect.median())
    ends = torch.tensor([middle * part for part in WITHIN], dtype=torch.float64)
    thresholds = torch.cat([ends, scores.null.quantile(0.2)[None]])
    far = middle + scores.null.quantile(0.99)
    effects = scores.effect.quantile(torch.linspace(0.02, 0.98, 25, dtype=torch.float64))

    def passing(parts: tuple[float, ...]) -> Tensor:
        """``[parts, T + 1]`` of samples with these parts of the effect, which share passes each threshold, and far."""
        shift = torch.tensor(parts, dtype=torch.float64)[:, None, None] * effects[:, None]
        below = torch.searchsorted(ranked, torch.cat([thresholds, far[None]]) - shift, right=True)
        return 1 - below.double().mean(1) / len(ranked)

    base, window = passing((0.0,))[0, :-1], (passing((1.0,)) - passing((0.0,)))[0, :-1]
    usable = window > 1e-3
    window = window.clamp(min=1e-3)
    discount = ((1 - base) / window - 1).clamp(min=0)

    def mean_of(share: Tensor) -> Tensor:
        return (share[..., :-1] - base) / window - discount * share[..., -1:]

    shift = -mean_of(passing(SMALLER)).amin(0).clamp(max=0)
    size = mean_of(passing(LARGER)).amin(0) + shift
    passes = (scores.samples[:, None] > torch.cat([thresholds, far[None]])).double()
    values, sizes = (mean_of(passes) + shift) / size.clamp(min=1e-3), _sizes(members)
    mean = _sums(members, values) / sizes[:, None]
    spread = (_sums(members, values.square()) / sizes[:, None] - mean.square()).clamp(min=0)
    of_null = base * (1 - base) / len(ranked) / (window * size.clamp(min=1e-3)).square()
    error = (spread / (sizes - 1).clamp(min=1)[:, None] + of_null).sqrt()
    factor = torch.tensor([student_quantile(count - 1, tail / len(thresholds)) for count in sizes.tolist()])
    high = torch.where(usable & (size > 1e-3), mean + factor.double()[:, None] * error, torch.inf)
    return high.amin(1).clamp(0, 1)


def smallest_share(scores: Scores) -> float:
    """The smallest share that a random sample as large as this shows with a power of 80 %: its lower end is above 0.

    Of samples whose effect passes every threshold, where the others are as the controls are. NaN where no share would
    do.
    """
    count, thresholds = len(scores.samples), scores.thresholds()
    shift = scores.effect.quantile(torch.linspace(0.05, 0.95, 10, dtype=torch.float64))
    shares = []
    for threshold in thresholds.tolist():
        of_null = int((scores.null > threshold).sum())
        # The lower end rises with the number of samples that pass: find the first at which it is above 0.
        few, enough = -1, count + 1
        while enough - few > 1:
            middle = (few + enough) // 2
            low = _lower_end(middle, count, of_null, len(scores.null), 0.025 / len(thresholds))
            few, enough = (few, middle) if low > 0 else (middle, enough)
        if enough <= count:
            # At this share of passing samples, as many pass with the power: a quantile of the beta distribution.
            needed = beta_quantile(POWER, enough, count - enough + 1)
            chance = float((scores.null[:, None] > threshold + shift).double().mean())
            shares.append((needed - chance) / (1 - chance))
    return min(shares, default=math.nan)


def _lower_difference(some: Tensor, sizes: Tensor, others: Tensor, of_others: int, tail: float) -> Tensor:
    """``[G, T]`` the lower end of ``some / sizes - others / of_others``: ``[G, T]``, ``[G]``, ``[T]`` and a number."""
    rows = zip(some.long().tolist(), sizes.tolist(), strict=True)
    ends = [
        [_lower_end(k, size, m, of_others, tail) for k, m in zip(row, others.tolist(), strict=True)]
        for row, size in rows
    ]
    return torch.tensor(ends, dtype=torch.float64)


def _lower_end(some: int, size: int, others: int, of_others: int, tail: float) -> float:
    """The lower end of the difference of two shares, ``some / size - others / of_others``.

    From the exact bound of each, joined as Zou & Donner (2008) recover variances from intervals.
    """
    first, second = some / size, others / of_others
    below, above = first - lower_bound(some, size, tail), upper_bound(others, of_others, tail) - second
    return first - second - math.hypot(below, above)


def _sums(members: Tensor, values: Tensor) -> Tensor:
    """``[G]`` or ``[G, K]`` sums of ``values`` ``[n]`` or ``[n, K]`` over the members of each group, float64."""
    return members.double() @ values.double()


def _sizes(members: Tensor) -> Tensor:
    """``[G]`` int64 numbers of members."""
    return _sums(members, torch.ones(members.shape[1])).long()
