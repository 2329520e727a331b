"""What a random sample says of a run: intervals, what could be found, groups, and bad input."""

import io
import math
from dataclasses import asdict

import pytest
import torch

from lightning_memsink.detection.run_statement import RunStatement, _mean_gap, state_run
from lightning_memsink.detection.statistics import conformal_p
from tests.support.made_up_gaps import NOISES, noise

D = 0.3


def state(gap, null=None, **changed):
    """The statement on samples of an even scale."""
    gap = torch.as_tensor(gap, dtype=torch.float32)
    null = noise("normal", 1000, torch.Generator().manual_seed(0)).float() if null is None else torch.as_tensor(null)
    count = len(gap)
    options = {
        "scale": torch.full((count,), 0.4),
        "by_chance": torch.full((count,), 0.1),
        "null_scale": torch.full((len(null),), 0.4),
        "threshold": D,
        "p_needed": 0.01,
        "population": 10 * count,
        "exposures": torch.ones(count, dtype=torch.int32),
        **changed,
    }
    return state_run(gap, options.pop("scale"), options.pop("by_chance"), null, options.pop("null_scale"), **options)


def gaps(count: int, memorized: int, seed: int = 1) -> torch.Tensor:
    own = noise("normal", count, torch.Generator().manual_seed(seed)).float()
    return own + 3 * (torch.arange(count) < memorized)


def test_a_run_of_which_half_is_memorized():
    it = state(gaps(256, 128))
    assert it.share == pytest.approx(0.5, abs=0.03) and 0.4 < it.share_low < 0.5 < it.share_high < 0.7
    assert 0.4 * 2560 < it.at_least <= 1280
    assert it.gap_low < 1.5 < it.gap_high and it.gap == pytest.approx(1.5, abs=0.05)
    assert (it.samples, it.population, it.by_second_look) == (256, 2560, True)


def test_the_lower_bound_on_how_many_has_the_confidence_of_one_side():
    it = state(gaps(256, 40))
    assert it.at_least >= it.share_low * it.population


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize(("samples", "share"), [(128, 0.0), (128, 0.5), (20, 0.0), (20, 0.5)])
def test_the_interval_of_the_mean_gap_holds_it(kind, samples, share):
    within = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        null, gap = noise(kind, 1000, generator), noise(kind, samples, generator)
        gap += 2 * (torch.rand(samples, generator=generator) < share)
        mean = 2 * share
        _, low, high = _mean_gap(gap, null, 10 * samples)
        within += low <= mean <= high
    assert within / 300 >= 0.93


def test_the_gap_of_the_only_sample_has_the_interval_of_a_control_and_one_of_several_none():
    within = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        null, gap = noise("heavy", 500, generator), noise("heavy", 1, generator) + 2
        _, low, high = _mean_gap(gap, null, 1)
        within += low <= 2 <= high
    assert within / 300 >= 0.93
    assert state([2.0], population=1).gap_high < 4
    assert (state([2.0]).gap_low, state([2.0]).gap_high) == (-math.inf, math.inf)


@pytest.mark.parametrize("p_needed", [0.05, 0.01, 0.002])
def test_a_sample_with_the_smallest_gap_is_flagged_four_times_in_five(p_needed):
    """The oracle: samples with that effect and a control's noise, against the conformal p-value."""
    null = noise("right", 999, torch.Generator().manual_seed(0)).float()
    found = state(gaps(30, 0), null, p_needed=p_needed).detectable_gap

    def power(effect: float) -> float:
        p = conformal_p((null + effect - D) / 0.4, null / 0.4)
        return float((p <= p_needed * (1 + 1e-5)).float().mean())

    assert power(found + 0.01) >= 0.8 > power(found - 0.05)


def test_no_gap_is_large_enough_where_the_controls_are_too_few():
    assert state(gaps(30, 0), gaps(98, 0), p_needed=0.01).detectable_gap == math.inf
    assert state(gaps(30, 0), gaps(99, 0), p_needed=0.01).detectable_gap < 3


def test_groups_by_exposures_and_by_source():
    exposures = torch.tensor([1] * 20 + [2, 3] * 10 + [9] * 20)
    source = torch.tensor([-1] * 5 + [1] * 15 + [0] * 40, dtype=torch.int16)
    gap = torch.cat([gaps(40, 0), gaps(20, 20)])
    it = state(gap, exposures=exposures, source=source, label_of={0: "books", 1: "web"}.get)
    assert [(group.label, group.samples) for group in it.by_exposures] == [("1", 20), ("2-3", 20), ("8-15", 20)]
    assert [group.share_low > 0 for group in it.by_exposures] == [False, False, True]
    assert [(group.label, group.samples) for group in it.by_source] == [("books", 40), ("web", 15)]
    alone = state(gap[40:])
    last = it.by_exposures[-1]
    assert (last.share, last.share_low) == (pytest.approx(alone.share), pytest.approx(alone.share_low))
    assert last.gap == pytest.approx(alone.gap)


def test_a_statement_comes_back_from_a_checkpoint(tmp_path):
    it = state(gaps(30, 10), source=torch.zeros(30, dtype=torch.int16), label_of=lambda code: None)
    stored = io.BytesIO()
    torch.save(asdict(it), stored)
    stored.seek(0)
    record = torch.load(stored, weights_only=True)
    assert RunStatement.of(record) == it and it.by_source[0].label == "0"
    assert RunStatement.of({**record, "later": 1}) == it


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("null", [[], [0.1], [0.0] * 50, [math.nan] * 50, [0.2, math.nan, math.inf]], ids=str)
def test_controls_that_tell_nothing_allow_no_statement(null):
    assert state(gaps(30, 30), torch.tensor(null, dtype=torch.float32)) is None


@pytest.mark.parametrize("gap", [[], [math.nan] * 3, [math.inf]], ids=str)
def test_no_measured_sample_allows_no_statement(gap):
    assert state(gap) is None


def test_samples_and_controls_without_a_finite_gap_are_left_out():
    gap, null = gaps(40, 10), noise("normal", 300, torch.Generator().manual_seed(3)).float()
    clean = state(gap, null, population=400)
    more = torch.cat([gap, torch.tensor([math.nan, math.inf, -math.inf, 5.0])])
    scale = torch.cat([torch.full((43,), 0.4), torch.tensor([0.0])])
    assert clean == state(more, torch.cat([null, torch.tensor([math.nan])]), scale=scale, population=400)
    unknown = torch.full((40,), 0.1)
    unknown[0] = math.nan
    assert math.isfinite(state(gap, null, by_chance=unknown).share)


def test_two_controls_say_next_to_nothing():
    it = state(gaps(30, 30), [-0.1, 0.1])
    assert it.share_low < 0.7 and it.share_high == 1 and it.detectable_gap == math.inf


def test_a_threshold_of_nothing_and_one_that_no_gap_reaches():
    assert state(gaps(30, 0), threshold=0.0).share_high == 1
    assert state(gaps(30, 30), threshold=50.0).share_low == 0
