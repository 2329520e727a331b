"""Exact probabilities of counts: how often as many of a kind come by chance.

S  shares
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-300


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
