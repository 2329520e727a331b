"""Intervals for shares against their definitions."""

import pytest
import torch

from lightning_memsink.detection.proportions import beta_distribution, binomial_tail, clopper_pearson


def tail_by_sum(at_least: int, trials: int, share: float) -> float:
    k = torch.arange(at_least, trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    log = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    p = torch.tensor(share, dtype=torch.float64)
    return float((log + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p)).exp().sum())


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 5), (3, 5), (5, 5), (1, 1000), (40, 1000), (999, 1000), (6, 100_000)])
def test_each_end_is_the_share_at_which_the_count_is_in_a_tail_of_one_fortieth(k, n):
    low, high = (float(end) for end in clopper_pearson(torch.tensor([k]), torch.tensor([n])))
    if k > 0:
        assert tail_by_sum(k, n, low) == pytest.approx(0.025, rel=1e-6)
    else:
        assert low == 0
    if k < n:
        assert 1 - tail_by_sum(k + 1, n, high) == pytest.approx(0.025, rel=1e-6)
    else:
        assert high == 1


def test_the_interval_of_no_trials_is_everything():
    low, high = clopper_pearson(torch.tensor([0, 0]), torch.tensor([0, 10]))
    assert low.tolist() == [0, 0] and high[0] == 1
    assert high[1].item() == pytest.approx(1 - 0.025 ** (1 / 10))
    low, high = clopper_pearson(torch.zeros(0).long(), torch.zeros(0).long())
    assert len(low) == len(high) == 0


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.98])
def test_the_binomial_tail_is_a_sum(share):
    k = torch.arange(8)
    expected = [1.0, *(tail_by_sum(n, 7, share) for n in range(1, 8))]
    assert binomial_tail(k, torch.full_like(k, 7), share).tolist() == pytest.approx(expected, rel=1e-9)
    assert binomial_tail(torch.tensor([8]), torch.tensor([7]), share).tolist() == [0]


@pytest.mark.parametrize(("share", "tails"), [(0.0, [1, 0, 0]), (1.0, [1, 1, 1])])
def test_the_binomial_tail_of_what_never_or_always_happens(share, tails):
    assert binomial_tail(torch.tensor([0, 1, 3]), torch.tensor([3, 3, 3]), share).tolist() == tails


def test_the_beta_distribution_is_symmetric_and_exact_for_large_parameters():
    x, a, b = torch.rand(50, dtype=torch.float64), 1 + 1e4 * torch.rand(50), 1 + 1e4 * torch.rand(50)
    assert torch.allclose(beta_distribution(x, a, b), 1 - beta_distribution(1 - x, b, a), atol=1e-12)
    a = torch.tensor([5e6])
    assert beta_distribution(torch.tensor([0.5]), a, a).item() == pytest.approx(0.5, abs=1e-9)
