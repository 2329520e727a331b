"""Expected losses are those of the nearest controls, and a sample far from all controls has none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_memsink.detection.matched_controls import Controls as DetectorControls
from lightning_memsink.detection.matched_controls import DetectionRule, SampleFeatures, measure_gaps
from lightning_memsink.mitigation.hold import Reference, over_set_point


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 5),
    controls=st.integers(16, 40),
    features=st.integers(1, 4),
    k=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_the_expected_loss_is_the_mean_of_the_nearest_controls(batch, controls, features, k, seed):
    """A loop that sorts all distances is the oracle; controls without a finite loss are not there."""
    own, losses = normal(controls + 1, features, seed=seed), normal(controls + 1, seed=seed + 1)
    losses[controls // 2] = torch.nan
    samples = normal(batch, features, seed=seed + 2)
    expected, _ = Reference.of(own, losses, k).expected(samples)
    finite = losses.isfinite()
    spread = own[finite].std(0, unbiased=False)
    for sample, loss in zip(samples, expected, strict=True):
        distances = ((sample - own[finite]) / spread).square().sum(1)
        nearest = distances.argsort()[:k]
        assert_close(loss, losses[finite][nearest].mean(), atol=1e-5, rtol=1e-5)


def test_who_has_a_match_is_who_the_detector_would_measure():
    own, losses = normal(40, 3, seed=1), normal(40, seed=2)
    samples = torch.cat([normal(10, 3, seed=3), 30 + normal(5, 3, seed=4)])
    _, matched = Reference.of(own, losses).expected(samples)
    nothing = torch.zeros(15)
    found = measure_gaps(
        SampleFeatures(nothing, nothing, samples),
        DetectorControls(losses, losses, own),
        DetectionRule(),
    )
    assert matched.tolist() == found.matched.tolist()
    assert not matched[10:].any() and matched[:10].any()


def test_features_that_are_unknown_or_all_the_same_decide_nothing():
    own, losses = normal(20, 2, seed=1), normal(20, seed=2)
    twin = torch.cat([own, torch.ones(20, 1), torch.full((20, 1), torch.nan)], 1)
    samples = normal(4, 2, seed=3)
    same = torch.cat([samples, torch.tensor([[7.0, torch.nan]] * 4)], 1)
    for plain, more in zip(
        Reference.of(own, losses).expected(samples), Reference.of(twin, losses).expected(same), strict=True
    ):
        assert_close(plain, more)


@pytest.mark.parametrize(
    ("features", "losses", "message"),
    [
        (torch.zeros(40, 0), torch.zeros(40), r"no features to match on.*LossTracker\(features="),
        (torch.zeros(15, 2), torch.zeros(15), "15 controls have a finite loss, and 16 are needed"),
        (torch.zeros(40, 2), torch.full((40,), torch.nan), "0 controls have a finite loss"),
        (torch.zeros(0, 2), torch.zeros(0), "0 controls have a finite loss"),
    ],
    ids=["no features", "too few", "no losses", "none"],
)
def test_controls_that_say_nothing_are_refused_with_the_cure(features, losses, message):
    with pytest.raises(ValueError, match=message):
        Reference.of(features, losses)


def test_a_loss_that_is_no_number_is_not_held():
    losses = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert over_set_point(losses, torch.full((4,), 2.0), torch.ones(4, dtype=torch.bool), 0.5).tolist() == [
        False,
        False,
        True,
        True,
    ]
