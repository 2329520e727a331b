"""From shares to sinks, against slow definitions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_memsink.localization.locate import (
    chance_jaccard,
    contrast,
    jaccard,
    locate,
    quota,
    top_units,
)


def shares(samples, sizes, carriers=None, seed=0):
    """Random shares; if any, units ``carriers`` (layer, unit) hold half of all."""
    values = torch.rand(samples, sum(sizes), generator=torch.Generator().manual_seed(seed))
    parts = list((values / values.sum(1, keepdim=True)).split(sizes, 1))
    for layer, unit in carriers or ():
        parts[layer][:, unit] += 1 / len(carriers)
    return {f"layer {n}": part / 2 if carriers else part for n, part in enumerate(parts)}


def test_the_units_that_do_more_for_flagged_samples_are_found():
    carriers = [(0, 2), (1, 5), (1, 0)]
    sinks = locate(shares(12, [10, 20], carriers), shares(12, [10, 20], seed=1), fraction=0.1)
    assert {(name, unit) for name, units in sinks.units.items() for unit in units.tolist()} == {
        (f"layer {layer}", unit) for layer, unit in carriers
    }
    observed, chance = sinks.stability
    assert observed == 1 and chance < 0.1
    assert sinks.method == "activation x gradient"


def test_a_unit_that_is_as_large_for_controls_is_no_sink():
    general = shares(8, [20], [(0, 4)])
    assert locate(general, fraction=0.05).units["layer 0"].tolist() == [4]
    assert locate(general, general, fraction=0.5).empty


def test_halves_of_samples_without_anything_in_common_agree_no_more_than_chance():
    observed, chance = locate(shares(40, [200]), shares(40, [200], seed=1), fraction=0.1).stability
    assert observed == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize(
    ("flagged", "controls", "expected"), [(1, 4, False), (4, 1, False), (2, 2, True), (2, None, True)]
)
def test_stability_needs_two_of_each(flagged, controls, expected):
    control = None if controls is None else shares(controls, [10], seed=1)
    assert (locate(shares(flagged, [10]), control, 0.2).stability is not None) is expected


def test_per_layer_takes_the_fraction_of_each_layer():
    target = shares(4, [10, 20], [(0, 1)])
    assert [len(units) for units in locate(target, None, 0.2, per_layer=True).units.values()] == [2, 4]


@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=5), min_size=1, max_size=3),
    fraction=st.floats(0.01, 1),
)
def test_top_units_are_those_of_a_sorted_list(scores, fraction):
    layers = {str(n): torch.tensor(own, dtype=torch.float) for n, own in enumerate(scores)}
    everyone = [(-value, layer, unit) for layer, own in enumerate(scores) for unit, value in enumerate(own)]
    best = {(str(layer), unit) for _, layer, unit in sorted(everyone)[: quota(len(everyone), fraction)]}
    chosen = top_units(layers, fraction)
    assert {(name, unit) for name, units in chosen.items() for unit in units.tolist()} == best
    for name, units in chosen.items():
        assert layers[name][units].tolist() == sorted(layers[name][units].tolist(), reverse=True)


def test_a_score_that_is_no_number_comes_last():
    assert top_units({"a": torch.tensor([torch.nan, -1.0, -torch.inf, 0.0])}, 0.5)["a"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("units", "first", "second"), [(5, 2, 3), (6, 1, 1), (4, 4, 2), (6, 3, 3), (5, 0, 2), (3, 0, 0)]
)
def test_chance_is_the_mean_over_all_pairs_of_sets(units, first, second):
    sides = [
        [{"a": torch.tensor(each, dtype=torch.int64)} for each in itertools.combinations(range(units), count)]
        for count in (first, second)
    ]
    pairs = [jaccard(one, other) for one, other in itertools.product(*sides)]
    assert chance_jaccard(units, first, second) == pytest.approx(sum(pairs) / len(pairs))


def test_contrast_is_a_difference_of_means():
    target, control = torch.rand(3, 4), torch.rand(5, 4)
    assert_close(contrast({"a": target}, {"a": control})["a"], target.mean(0) - control.mean(0))


@pytest.mark.parametrize(
    ("target", "control", "fraction", "message"),
    [
        ({}, None, 0.1, "target is"),
        ({"a": torch.ones(0, 4)}, None, 0.1, "target is"),
        ({"a": torch.ones(4)}, None, 0.1, "target is"),
        ({"a": torch.ones(2, 4)}, {"a": torch.ones(0, 4)}, 0.1, "control is"),
        ({"a": torch.ones(2, 4)}, {"a": torch.ones(2, 3)}, 0.1, "the same layers"),
        ({"a": torch.ones(2, 4)}, None, 0, "fraction is"),
        ({"a": torch.ones(2, 4)}, None, 1.5, "fraction is"),
    ],
)
def test_input_that_can_not_be_located_is_refused(target, control, fraction, message):
    with pytest.raises(ValueError, match=message):
        locate(target, control, fraction)
