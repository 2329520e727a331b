"""Measures of concentration have their definitions, and p-values of the test are uniform under the null."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_memsink.localization.concentration import (
    Concentration,
    NotTested,
    concentration_test,
    effective_units,
    gini,
    top_share,
)

SIZES = st.floats(0, 1e6).map(lambda size: size if size > 1e-300 else 0.0)  # what can be scaled
SHARES = st.lists(SIZES, min_size=1, max_size=30).map(lambda row: torch.tensor(row, dtype=torch.float64))


def gini_by_pairs(shares: list[float]) -> float:
    """The definition: mean absolute difference of all pairs over twice the mean."""
    total, units = sum(shares), len(shares)
    return sum(abs(a - b) for a in shares for b in shares) / (2 * units * total) if total else 0.0


@settings(deadline=None, max_examples=50)
@given(SHARES)
def test_gini_is_the_mean_difference_of_pairs(shares):
    assert gini(shares) == pytest.approx(gini_by_pairs(shares.tolist()), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(SHARES, st.floats(0.1, 10))
def test_scale_and_order_do_not_matter(shares, scale):
    other = shares.flip(0) * scale
    for measure in (gini, effective_units, top_share):
        assert measure(other) == pytest.approx(measure(shares), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("units", [1, 4, 1000])
def test_both_ends_of_each_measure(units):
    even, one, none = torch.ones(units), torch.eye(units)[0], torch.zeros(units)
    assert gini(even) == pytest.approx(0, abs=1e-9) and gini(one) == pytest.approx(1 - 1 / units)
    assert effective_units(even) == pytest.approx(units) and effective_units(one) == pytest.approx(1)
    assert top_share(even) == pytest.approx(max(1, units // 100) / units) and top_share(one) == 1
    assert gini(none) == effective_units(none) == top_share(none) == 0


def test_effective_units_is_the_exponential_of_the_entropy():
    assert effective_units(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.1])
def test_a_fraction_is_a_fraction(fraction):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        top_share(torch.ones(3), fraction)


def samples(count: int, seed: int, on: slice | None = None, boost: float = 20.0) -> Tensor:
    rows = torch.rand(count, 50, generator=torch.Generator().manual_seed(seed))
    if on is not None:
        rows[:, on] *= boost
    return rows / rows.sum(1, keepdim=True)


def test_samples_that_share_units_cluster():
    result = concentration_test(samples(20, 0, slice(0, 3)), samples(60, 1))
    assert isinstance(result, Concentration)
    assert result.p == pytest.approx(1 / 1000) and result.gini > result.null_high > result.null_low
    assert result.gini > result.scattered_gini and result.samples == 20
    assert str(result).startswith("The attribution of 20 flagged samples is more concentrated than")


def test_each_concentrated_on_units_of_its_own_is_no_cluster():
    own = torch.stack([samples(1, n, slice(n, n + 1))[0] for n in range(20)])
    result = concentration_test(own, samples(60, 99, slice(48, 50)), permutations=199)
    assert isinstance(result, Concentration)
    assert result.p > 0.5 and abs(result.gini - result.scattered_gini) < 0.15
    assert "not shown to be more concentrated" in str(result)


def test_units_that_matter_to_everyone_are_no_cluster():
    result = concentration_test(samples(20, 0, slice(0, 3)), samples(60, 1, slice(0, 3)), permutations=199)
    assert isinstance(result, Concentration) and result.p > 0.05


def test_p_is_uniform_when_flags_mean_nothing():
    p_values = [concentration_test(samples(8, seed), samples(24, 1000 + seed), 99).p for seed in range(120)]
    assert 0.02 <= sum(p <= 0.1 for p in p_values) / len(p_values) <= 0.18
    assert 0.38 <= sum(p <= 0.5 for p in p_values) / len(p_values) <= 0.62


def test_the_test_repeats_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = (concentration_test(samples(6, 0), samples(9, 1), 49, seed=3) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), before)


def test_identical_groups_are_not_called_different():
    rows = torch.ones(6, 4) / 4
    result = concentration_test(rows, rows, 99)
    assert isinstance(result, Concentration) and result.p == 1


@pytest.mark.parametrize("counts, who", [((4, 20), "4 flagged"), ((20, 0), "0 unflagged")])
def test_too_few_samples_are_not_tested(counts, who):
    result = concentration_test(samples(counts[0], 0), samples(counts[1], 1))
    assert (
        isinstance(result, NotTested) and str(result) == f"Concentration was not tested: {who} samples, and it needs 5."
    )


@pytest.mark.parametrize(
    "flagged, message",
    [
        (torch.ones(6, 4), r"got \(\[6, 4\], \[9, 50\]\)"),
        (-samples(6, 0), "flagged ones are negative"),
        (samples(6, 0) * torch.nan, "not finite"),
    ],
)
def test_wrong_shares_are_refused(flagged, message):
    with pytest.raises(ValueError, match=message):
        concentration_test(flagged, samples(9, 1))
