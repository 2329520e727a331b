"""The detector's mathematics against definitions and simulation."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memsink.detection.feature_units import farthest, standardize
from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.matched_controls import Controls, DetectionRule, SampleFeatures, measure_gaps
from lightning_memsink.detection.statistics import (
    benjamini_hochberg,
    conformal_p,
    controls_for,
    flagged_together,
    null_share,
    too_few_together,
)

seeds = st.integers(0, 2**16)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, n=st.integers(1, 30), m=st.integers(1, 30), ties=st.booleans())
def test_conformal_p_counts_the_controls_that_reach_the_score(seed, n, m, ties):
    scores, null = normal(n, seed=seed), normal(m, seed=seed + 1)
    if ties:
        scores, null = scores.round(), null.round()
    expected = [(1 + sum(float(c) >= float(s) for c in null)) / (m + 1) for s in scores]
    assert conformal_p(scores, null).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True], ids=["continuous", "ties"])
def test_conformal_p_is_never_too_small_under_the_null(ties):
    """P(p <= t) <= t at every t, within sampling error, and close to t where there are no ties."""
    trials, m = 4000, 39
    drawn = normal(trials, m + 1)
    drawn = drawn.round() if ties else drawn
    p = torch.stack([conformal_p(row[:1], row[1:])[0] for row in drawn])
    for t in (0.025, 0.05, 0.1, 0.25, 0.5, 0.9):
        share, error = float((p <= t).float().mean()), 3 * math.sqrt(t * (1 - t) / trials)
        assert share <= t + error
        assert ties or share >= t - error


@given(p=st.lists(st.floats(0, 1), max_size=40), alpha=st.floats(0.01, 0.5))
def test_benjamini_hochberg_rejects_by_its_definition(p, alpha):
    """The largest k with k-th smallest p <= alpha k / n; everything at or below that p."""
    p = torch.tensor(p, dtype=torch.float64)
    passing = [k for k in range(1, len(p) + 1) if float(p.sort().values[k - 1]) <= alpha * k / len(p) * (1 + 1e-6)]
    cut = float(p.sort().values[passing[-1] - 1]) if passing else -1.0
    assert benjamini_hochberg(p, alpha).tolist() == [float(one) <= cut for one in p]


def test_false_discoveries_stay_below_the_nominal_rate():
    """20 % of the samples have an effect; realized false-discovery rate over 200 repetitions, at alpha = .1."""
    rates = []
    for seed in range(200):
        scores = normal(100, seed=seed)
        scores[:20] += 4
        rejected = benjamini_hochberg(conformal_p(scores, normal(500, seed=10_000 + seed)), 0.1)
        rates.append(float(rejected[20:].sum() / max(1, int(rejected.sum()))))
    rates = torch.tensor(rates)
    assert rates.mean() <= 0.1 + 2 * rates.std() / math.sqrt(200)


def test_controls_needed_is_the_smallest_number_whose_floor_passes():
    for samples, memorized in ((1000, 1), (1000, 40), (7, 2)):
        m = controls_for(samples, 0.05, memorized)
        for controls, passes in ((m, True), (m - 1, False)):
            p = torch.cat([torch.full((memorized,), 1 / (controls + 1)), torch.ones(samples - memorized)])
            assert bool(benjamini_hochberg(p.double(), 0.05).any()) is passes


def world(seed=0, n=300, m=300, memorized=20):
    """Losses that follow one feature of difficulty; the first samples lie 3 nats below what theirs says."""
    features, own = normal(n, 2, seed=seed), normal(m, 2, seed=seed + 1)
    losses = 4 + features[:, 0] + 0.2 * normal(n, seed=seed + 2)
    losses[:memorized] -= 3
    control = 4 + own[:, 0] + 0.2 * normal(m, seed=seed + 3)
    samples = SampleFeatures(losses, torch.ones(n), features)
    return samples, Controls(control, control, own)


@pytest.mark.parametrize("method", ["knn", "ridge"])
def test_memorized_samples_stand_out_and_easy_ones_do_not(method):
    found = measure_gaps(*world(), DetectionRule(method=method))
    assert found.flagged[:20].float().mean() > 0.9
    assert not found.flagged[20:].any()  # the easiest of them have losses as low as memorized ones


def test_a_visit_between_two_evaluations_is_measured_by_both():
    samples, controls = world(memorized=0)
    drifting = replace(controls, before=controls.before + 2)
    late = measure_gaps(samples, drifting, DetectionRule())
    early = measure_gaps(
        replace(samples, losses=samples.losses + 2, weight=torch.zeros(300)), drifting, DetectionRule()
    )
    torch.testing.assert_close(late.gap, early.gap)


def test_too_few_controls_flag_nothing_however_large_the_gap():
    """Three of 2,000 beyond all of 60 controls: the smallest p-value is 1/61, and no tail is fitted."""
    found = measure_gaps(*world(n=2000, m=60, memorized=3), DetectionRule(alpha=0.01))
    assert found.beyond[:3].all() and not found.flagged.any()
    assert found.p.min() == pytest.approx(1 / 61)


def test_the_effect_is_part_of_the_hypothesis():
    """All samples lie .2 nats below their controls: no evidence of more than .3, but of more than 0."""
    samples, controls = world(memorized=0)
    lower = replace(samples, losses=samples.losses - 0.2)
    p = [measure_gaps(lower, controls, DetectionRule(min_gap=effect)).p.mean() for effect in (0.3, 0.0)]
    assert p[0] > 0.55 and p[1] < 0.35


def test_without_anything_to_match_on_the_mean_of_all_controls_is_expected():
    loss = 5 + normal(50)
    controls = Controls(loss, loss, torch.zeros(50, 0))
    found = measure_gaps(
        SampleFeatures(torch.tensor([2.0, 5.0]), torch.ones(2), torch.zeros(2, 0)), controls, DetectionRule()
    )
    torch.testing.assert_close(found.gap, loss.mean() - torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(found.null, (loss.sum() - loss) / 49 - loss)
    assert found.matched.all()


def test_more_controls_than_are_searched_are_all_ranked_among(monkeypatch):
    samples, controls = world(m=600)
    everything = measure_gaps(samples, controls, DetectionRule())
    monkeypatch.setattr("lightning_memsink.detection.matched_controls.MAX_REFERENCE", 300)
    found = measure_gaps(samples, controls, DetectionRule())
    assert len(found.null) == 600 and found.p.min() == pytest.approx(1 / 601)
    assert (found.p - everything.p).abs().median() < 0.03
    assert found.flagged[:20].float().mean() > 0.9 and not found.flagged[20:].any()


def test_the_share_of_nulls_is_that_of_large_p_values():
    p = torch.cat([torch.full((60,), 1e-3), torch.linspace(0, 1, 41)])
    assert null_share(p) == pytest.approx(0.4, abs=0.08)
    assert null_share(torch.zeros(0)) == 1.0 and null_share(torch.ones(5)) == 1.0
    assert (
        null_share(torch.full((500,), 1e-3)) == null_share(torch.full((500,), 0.15)) == pytest.approx(1 / (500 * 0.8))
    )
    assert null_share(torch.full((500,), 0.28)) == 1.0
    assert null_share(torch.linspace(0, 0.52, 300)) < 0.01  # a coin's toss knows every second control


def test_few_at_once_are_asked_for_more_the_more_evaluations_there_are():
    """One of a hundred at p = .0004 is flagged by the first evaluation's plain rate only; eight at once by any."""
    one = torch.cat([torch.tensor([4e-4]), torch.linspace(0.1, 1, 99)])
    assert benjamini_hochberg(one, 0.05).sum() == 1
    assert not benjamini_hochberg(one, 0.05, few=too_few_together(1)).any()
    eight = torch.cat([torch.full((8,), 3e-3), torch.linspace(0.1, 1, 92)])
    assert [int(benjamini_hochberg(eight, 0.05, few=too_few_together(many)).sum()) for many in (1, 40)] == [8, 8]
    for samples, controls in ((100, 50), (100, 3000), (10, 10**5), (1000, 500)):
        few = too_few_together(10)
        k = flagged_together(samples, controls, 0.05, few)
        for many in (k - 1, k):
            p = torch.full((samples,), 1.0)
            p[:many] = 1 / (controls + 1)
            assert bool(benjamini_hochberg(p, 0.05, few=few).any()) is (0 < many == k <= samples)
        needed = controls_for(samples, 0.05, k, few)
        assert needed <= controls


def test_samples_far_from_every_control_are_not_matched():
    samples, controls = world()
    samples.features[:20] += 50
    found = measure_gaps(samples, controls, DetectionRule())
    assert not found.matched[:20].any() and not found.flagged[:20].any()
    assert found.matched[20:].float().mean() > 0.95


def test_a_sample_is_matched_within_the_reach_of_its_features():
    samples, controls = world()
    samples = replace(samples, features=samples.features * torch.linspace(1, 6, 300)[:, None])
    static, own = standardize(samples.features, controls.features)
    reached = nearest(static, own, 8)[1] <= farthest(own, 8, 2.0)
    assert 20 < int(reached.sum()) < 280
    assert torch.equal(measure_gaps(samples, controls, DetectionRule()).matched, reached)


def test_a_control_with_an_infinite_loss_is_left_out():
    samples, controls = world()
    broken = controls.after.clone()
    broken[:5] = torch.tensor([math.inf, -math.inf, math.nan, math.inf, math.nan])
    found = measure_gaps(samples, replace(controls, after=broken), DetectionRule())
    assert len(found.null) == 295 and torch.isfinite(found.gap).all()


def test_where_controls_scatter_more_a_gap_counts_less():
    """Two kinds of text, one with ten times the spread: the same gap has a larger p-value there.

    Median over samples, and no two texts alike: which of many equally near controls are taken is arbitrary.
    """
    kind = torch.arange(300) % 2
    features = kind + 0.01 * normal(300, seed=1)
    loss = 5 + normal(300) * torch.where(kind == 1, 1.0, 0.1)
    controls = Controls(loss, loss, features[:, None])
    samples = SampleFeatures(torch.full((100,), 4.2), torch.ones(100), features[:100, None])
    p = measure_gaps(samples, controls, DetectionRule(k=4, min_gap=0)).p
    calm, wild = p[0::2].median(), p[1::2].median()
    assert calm < 0.05 < wild > 2 * calm  # unscaled, equal gaps have equal p-values


@given(seed=seeds, n=st.integers(1, 12), m=st.integers(3, 12), k=st.integers(1, 4))
def test_nearest_is_what_sorting_all_distances_gives(seed, n, m, k):
    points, among = normal(n, 2, seed=seed), normal(m, 2, seed=seed + 1)
    index, distance = nearest(points, among, k)
    for row in range(n):
        apart = sorted((float((points[row] - other).norm()), at) for at, other in enumerate(among))[:k]
        assert index[row].tolist() == [at for _, at in apart]
        assert float(distance[row]) == pytest.approx(sum(d for d, _ in apart) / len(apart), rel=1e-3, abs=1e-3)
    assert all(row not in index for row, index in enumerate(nearest(among, among, k, leave_one_out=True)[0].tolist()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha is a false-discovery rate between 0 and 1, but it is 1\.5"),
        ({"k": 0}, r"k is a number of controls, at least 1, but it is 0"),
        ({"method": "nn"}, r"method is 'knn' or 'ridge', but it is 'nn'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionRule(**options)
