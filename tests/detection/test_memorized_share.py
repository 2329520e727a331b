"""Bounds of the memorized share against populations in which it is known."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from lightning_memsink.detection.memorized_share import (
    ABOVE,
    Scores,
    lowest_shares,
    shares_above,
    smallest_share,
)
from tests.support.made_up_gaps import noise

EFFECT = 0.3


def scores_of(gap: Tensor, null: Tensor, effect: float = EFFECT) -> Scores:
    size = null.abs().mean()
    by_chance = (null > effect).double().mean().expand(len(gap))
    return Scores(gap / size, torch.full_like(gap, effect) / size, null / size, by_chance)


def groups(count: int, size: int) -> Tensor:
    """Bool ``[count, count * size]``: as many samples to each group."""
    return torch.eye(count, dtype=torch.bool).repeat_interleave(size, 1)


def covered(kind: str, samples: int, controls: int, share: float, effect: float) -> tuple[float, float]:
    """In which part of 300 draws the interval, and the lower bound of 95 %, hold the true share."""
    within = above = 0
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        null, own = noise(kind, controls, generator), noise(kind, 20 * samples, generator)
        gap = own + effect * (torch.rand(len(own), generator=generator) < share)
        scores, members = scores_of(gap, null), groups(20, samples)
        _, low, high = shares_above(scores, members)
        within += int(((low <= share) & (share <= high)).sum())
        above += int((lowest_shares(scores, members, 0.05) <= share).sum())
    return within / 300, above / 300


@pytest.mark.parametrize("kind", ["normal", "heavy", "right", "left"])
@pytest.mark.parametrize(("share", "effect"), [(0.0, 0.0), (0.5, 1.0), (1.0, 1.0)])
def test_the_interval_holds_the_share_that_is_memorized(kind, share, effect):
    assert min(covered(kind, 128, 1000, share, effect)) >= 0.93


@pytest.mark.parametrize(("samples", "controls"), [(20, 1000), (20, 50), (1, 200)])
@pytest.mark.parametrize(("share", "effect"), [(0.0, 0.0), (0.05, 2.0), (0.5, 2.0), (1.0, 2.0)])
def test_it_does_with_few_samples_and_few_controls(samples, controls, share, effect):
    assert min(covered("heavy", samples, controls, share, effect)) >= 0.93


def test_where_all_is_memorized_the_interval_ends_at_all_and_where_nothing_is_it_begins_at_nothing():
    generator = torch.Generator().manual_seed(0)
    null, own = noise("normal", 2000, generator), noise("normal", 1024, generator)
    share, low, high = shares_above(scores_of(own + 3 * (torch.arange(1024) < 512), null), groups(2, 512))
    assert share[0] > 0.99 and low[0] > 0.97 and high[0] == 1
    assert share[1] < 0.03 and low[1] == 0 and high[1] < 0.12


def test_effects_that_are_smaller_than_the_one_in_question_count_for_nothing():
    """A run that learned all a little: more gaps pass the effect than by chance, but no sample's own effect does."""
    generator = torch.Generator().manual_seed(0)
    null, own = noise("normal", 2000, generator), noise("normal", 2000, generator)
    scores = scores_of(own + 0.25, null)
    share, low, _ = shares_above(scores, groups(1, 2000))
    assert share > 0.2, "the value alone would mislead"
    assert low == 0


def test_who_is_memorized_may_depend_on_the_noise():
    """Random labels of ten classes: one in ten is guessed without training on it, and nine in ten have an effect."""
    generator = torch.Generator().manual_seed(0)

    def unseen(count: int) -> Tensor:
        return torch.where(
            torch.rand(count, generator=generator) < 0.1, 0.05, 6 + torch.rand(count, generator=generator)
        )

    null = 5.8 - unseen(1000).double()
    within = 0
    for _ in range(50):
        before, after = unseen(128).double(), torch.full((128,), 0.02, dtype=torch.float64)
        truth = float((before - after > EFFECT).double().mean())
        _, low, high = shares_above(scores_of(5.8 - after, null), groups(1, 128))
        within += bool(low <= truth <= high)
    assert within == 50


def test_the_lower_end_is_the_largest_difference_of_two_shares():
    """The oracle: the definition, a threshold at a time."""
    generator = torch.Generator().manual_seed(0)
    null, gap = noise("right", 60, generator), noise("right", 40, generator) + 0.8
    scores, ends = scores_of(gap, null), []
    for quantile in ABOVE:
        threshold = sorted(scores.null.tolist())[min(59, int(torch.tensor(quantile * 60).ceil()) - 1)]
        k = sum(s - e > threshold for s, e in zip(scores.samples.tolist(), scores.effect.tolist(), strict=True))
        m = sum(value > threshold for value in scores.null.tolist())
        low = binomtest(k, 40).proportion_ci(1 - 0.05 / len(ABOVE), method="exact").low
        high = binomtest(m, 60).proportion_ci(1 - 0.05 / len(ABOVE), method="exact").high
        ends.append(k / 40 - m / 60 - ((k / 40 - low) ** 2 + (high - m / 60) ** 2) ** 0.5)
    assert float(lowest_shares(scores, groups(1, 40), 0.025)) == pytest.approx(max(0, *ends))


@pytest.mark.parametrize(("samples", "controls"), [(128, 2000), (20, 300)])
def test_the_smallest_share_is_one_that_four_in_five_samples_show(samples, controls):
    shown = {1.0: 0, 0.5: 0}
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        null = noise("normal", controls, generator)
        share = smallest_share(scores_of(noise("normal", samples, generator), null))
        for part in shown:
            is_memorized = torch.rand(20 * samples, generator=generator) < part * share
            gap = torch.where(is_memorized, 50, noise("normal", 20 * samples, generator))
            shown[part] += int((shares_above(scores_of(gap, null), groups(20, samples))[1] > 0).sum())
    assert shown[1.0] / 300 == pytest.approx(0.8, abs=0.08)
    assert shown[0.5] / 300 < 0.6


def test_a_sample_of_one_shows_no_share():
    null = noise("normal", 500, torch.Generator().manual_seed(0))
    scores = scores_of(torch.tensor([9.0], dtype=torch.float64), null)
    assert torch.tensor(smallest_share(scores)).isnan()
    assert [float(end) for end in shares_above(scores, groups(1, 1))[1:]] == [0, 1]
