"""Intervals for shares against their definitions."""

import pytest
import torch

from lightning_memsink.detection.proportions import beta_distribution, binomial_tail


def tail_by_sum(at_least: int, trials: int, share: float) -> float:
    k = torch.arange(at_least, trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    log = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    p = torch.tensor(share, dtype=torch.float64)
    return float((log + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p)).exp().sum())


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
