"""Exact intervals for shares: how many of a kind there are, if some of a few are.

S  shares
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_TINY = 1e-300


def clopper_pearson(successes: Tensor, trials: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The interval ``[S]``, ``[S]`` of Clopper and Pearson (1934) for ``successes`` ``[S]`` of ``trials`` ``[S]``.

    It covers the true share with at least the probability ``level``, however few trials there are and however small the
    share is. Wilson's interval covers it on average only: its lower end for 1 of 1,000 is passed by chance by one
    in six sources whose share is that low, where this one allows one in forty. Without trials it is 0 to 1.

    >>> low, high = clopper_pearson(torch.tensor([0, 5]), torch.tensor([10, 10]))
    >>> [round(x, 4) for x in low.tolist()], [round(x, 4) for x in high.tolist()]
    ([0.0, 0.1871], [0.3085, 0.8129])
    """
    tail = (1 - level) / 2
    k, n = successes.double(), trials.double()
    low, high = torch.zeros_like(k), torch.ones_like(k)
    some, others = k > 0, k < n
    low[some] = beta_quantile(tail, k[some], (n - k)[some] + 1)
    high[others] = 1 - beta_quantile(tail, (n - k)[others], k[others] + 1)
    return low, high


def binomial_tail(at_least: Tensor, trials: Tensor, share: float) -> Tensor:
    """``[S]`` probability of ``at_least`` ``[S]`` successes in ``trials`` ``[S]``, each with probability ``share``.

    >>> round(float(binomial_tail(torch.tensor([2]), torch.tensor([3]), 0.5)), 6)
    0.5
    """
    k, n = at_least.double(), trials.double()
    tail = (k <= 0).double()
    some = (k > 0) & (k <= n)
    tail[some] = beta_distribution(torch.full_like(k[some], share), k[some], (n - k)[some] + 1)
    return tail


def beta_distribution(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``[S]`` the regularized incomplete beta function ``I_x(a, b)``, float64, for a and b above 0.

    By its continued fraction (DLMF 8.17.22) in Lentz's form, on the side of the mean where it converges in about the
    square root of ``a + b`` terms.
    """
    x, a, b = x.double().clamp(0, 1), a.double(), b.double()
    swap = x > (a + 1) / (a + b + 2)
    x, a, b = torch.where(swap, 1 - x, x), torch.where(swap, b, a), torch.where(swap, a, b)
    log_front = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + torch.xlogy(a, x) + b * torch.log1p(-x)
    value = (log_front.exp() / a * _fraction(x, a, b)).clamp(0, 1)
    return torch.where(swap, 1 - value, value)


def beta_quantile(probability: float, a: Tensor, b: Tensor) -> Tensor:
    """``[S]`` the x with ``I_x(a, b) = probability``: Newton's steps in the logit of x, within a bracket."""
    mean, size = a / (a + b), a + b
    result = torch.logit(mean, eps=1e-15)
    half = 12 / (mean * (1 - mean) * (size + 1)).sqrt() + 12 / torch.minimum(a, b)
    low, high, logit = result - half, result + half, result.clone()
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(size)
    left = torch.arange(len(a))
    result[b == 1] = torch.logit(probability ** (1 / a[b == 1]))
    result[a == 1] = torch.logit(-torch.expm1(math.log1p(-probability) / b[a == 1]))
    is_open = (a != 1) & (b != 1)
    left, logit, low, high, a, b, log_beta = (part[is_open] for part in (left, logit, low, high, a, b, log_beta))
    for _ in range(100):
        if not len(left):
            break
        error = beta_distribution(torch.sigmoid(logit), a, b) - probability
        low, high = torch.where(error < 0, logit, low), torch.where(error > 0, logit, high)
        slope = (a * logsigmoid(logit) + b * logsigmoid(-logit) - log_beta).exp()
        step = logit - error / slope.clamp(min=_TINY)
        following = torch.where((step > low) & (step < high), step, (low + high) / 2)
        result[left] = following
        keep = (following - logit).abs() > 1e-9 * (1 + logit.abs())
        left, logit, low, high = left[keep], following[keep], low[keep], high[keep]
        a, b, log_beta = a[keep], b[keep], log_beta[keep]
    return torch.sigmoid(result)


def _fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The continued fraction of `beta_distribution`; each element is computed until it no longer changes."""
    result = torch.ones_like(x)
    left = torch.arange(len(x))
    c, d = torch.ones_like(x), _reciprocal(1 - (a + b) * x / (a + 1))
    value = d.clone()
    for term in range(1, 100_000):
        if not len(left):
            break
        even = term * (b - term) * x / ((a + 2 * term - 1) * (a + 2 * term))
        d, c = _reciprocal(1 + even * d), _nonzero(1 + even / c)
        value = value * d * c
        odd = -(a + term) * (a + b + term) * x / ((a + 2 * term) * (a + 2 * term + 1))
        d, c = _reciprocal(1 + odd * d), _nonzero(1 + odd / c)
        factor = d * c
        value = value * factor
        done = (factor - 1).abs() < 1e-14
        if term % 8 and not bool(done.all()):
            continue
        result[left] = value
        keep = ~done
        left, value, c, d, x, a, b = left[keep], value[keep], c[keep], d[keep], x[keep], a[keep], b[keep]
    return result


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values.abs() < _TINY, _TINY, values)


def _reciprocal(values: Tensor) -> Tensor:
    return 1 / _nonzero(values)
