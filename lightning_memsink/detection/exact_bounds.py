"""Exact bounds of single shares, and quantiles of Student's t, one number at a time.

`proportions` has intervals of many shares at once. A statement on a run takes a few dozen, of few different counts: for
so few, a loop over floats that remembers its results takes a hundredth of the time that tensors take.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

_TINY = 1e-300


def lower_bound(successes: int, trials: int, tail: float) -> float:
    """The share below which the true one is with a probability of ``tail`` at most (Clopper & Pearson 1934).

    >>> round(lower_bound(5, 10, 0.025), 4)
    0.1871
    """
    return beta_quantile(tail, successes, trials - successes + 1) if successes else 0.0


def upper_bound(successes: int, trials: int, tail: float) -> float:
    """The share above which the true one is, likewise.

    >>> round(upper_bound(0, 10, 0.025), 4)
    0.3085
    """
    return 1 - lower_bound(trials - successes, trials, tail)


def student_quantile(freedom: int, tail: float) -> float:
    """What Student's t with so many degrees of ``freedom`` exceeds with the probability ``tail``; infinite without any.

    >>> round(student_quantile(10, 0.025), 4)
    2.2281
    """
    if freedom < 1:
        return math.inf
    x = beta_quantile(2 * tail, freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - x) / x)


@lru_cache(maxsize=1 << 14)
def beta_quantile(probability: float, a: float, b: float) -> float:
    """The x with ``I_x(a, b) = probability``: Halley's steps from the normal approximation, within a bracket, which is
    halved where they leave it."""
    mean = a / (a + b)
    guess = mean + NormalDist().inv_cdf(probability) * math.sqrt(mean * (1 - mean) / (a + b + 1))
    low, high, x = 0.0, 1.0, guess if 0 < guess < 1 else mean
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    for _ in range(200):
        error = beta_distribution(x, a, b) - probability
        low, high = (x, high) if error < 0 else (low, x)
        newton = error / max(math.exp((a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - log_beta), _TINY)
        bend = newton * ((a - 1) / x - (b - 1) / (1 - x))
        following = x - newton / (1 - 0.5 * max(-1.0, min(1.0, bend)))
        if not low < following < high:
            following = (low + high) / 2
        elif abs(following - x) <= max(1e-6 * min(x, 1 - x), 1e-13 * x):  # what is left is of the third power of this
            return following
        x = following
    return x


def beta_distribution(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function ``I_x(a, b)`` for ``0 < x < 1``, by its continued fraction (DLMF
    8.17.22) in Lentz's form."""
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_distribution(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or _TINY)
    value = d
    for term in range(1, 100_000):
        even = term * (b - term) * x / ((a + 2 * term - 1) * (a + 2 * term))
        d, c = 1 / ((1 + even * d) or _TINY), (1 + even / c) or _TINY
        value *= d * c
        odd = -(a + term) * (a + b + term) * x / ((a + 2 * term) * (a + 2 * term + 1))
        d, c = 1 / ((1 + odd * d) or _TINY), (1 + odd / c) or _TINY
        value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return min(1.0, front / a * value)
