"""Bounds of single shares against those of many at once, and Student's t against its density."""

import math

import pytest
import torch
from scipy.stats import binomtest

from lightning_memsink.detection.exact_bounds import (
    beta_distribution,
    beta_quantile,
    lower_bound,
    student_quantile,
    upper_bound,
)

COUNTS = [(0, 1), (1, 1), (0, 5), (1, 5), (5, 5), (40, 1000), (999, 1000), (6, 100_000)]


@pytest.mark.parametrize("level", [0.95, 0.9875])
def test_bounds_are_those_of_clopper_and_pearson(level):
    expected = [binomtest(k, n).proportion_ci(level, method="exact") for k, n in COUNTS]
    tail = (1 - level) / 2
    assert [lower_bound(*pair, tail) for pair in COUNTS] == pytest.approx([each.low for each in expected], rel=1e-8)
    assert [upper_bound(*pair, tail) for pair in COUNTS] == pytest.approx([each.high for each in expected], rel=1e-8)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1, 400), (3.5, 0.5), (200, 313), (100, 0.5)])
@pytest.mark.parametrize("probability", [1e-3, 0.2, 0.95])
def test_a_quantile_is_where_the_distribution_has_the_probability(a, b, probability):
    assert beta_distribution(beta_quantile(probability, a, b), a, b) == pytest.approx(probability, rel=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 19, 511])
def test_a_tail_of_students_t_is_the_integral_of_its_density(freedom):
    """The oracle: the trapezoid rule between 0 and the quantile."""
    t = torch.linspace(0, student_quantile(freedom, 0.025), 20001, dtype=torch.float64)
    density = (1 + t.square() / freedom) ** (-(freedom + 1) / 2)
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    assert norm * float(torch.trapezoid(density, t)) == pytest.approx(0.475, abs=1e-6)


def test_without_degrees_of_freedom_nothing_is_known():
    assert student_quantile(0, 0.025) == math.inf
