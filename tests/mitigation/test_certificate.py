"""What a certificate says of losses under own, dropped and another sample's sinks."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memsink.mitigation.certificate import FEWEST, Certificate, certify, signed_rank_p
from lightning_memsink.mitigation.certificate_samples import KeptBatch, MostExposed, placebo, twin_losses
from lightning_memsink.samples.control_table import ControlTable


def brute_force_p(differences: list[float]) -> float:
    """Of all ways to give the differences signs, the share with at least this rank sum above zero."""
    nonzero = [value for value in differences if value]
    size = sorted(abs(value) for value in nonzero)
    rank = {value: sum(n + 1 for n, other in enumerate(size) if other == value) / size.count(value) for value in size}
    seen = sum(rank[abs(value)] for value in nonzero if value > 0)
    sums = [sum(rank[of] for of, up in zip(size, ups, strict=True) if up) for ups in product([0, 1], repeat=len(size))]
    return sum(total >= seen for total in sums) / len(sums)


@given(differences=st.lists(st.integers(-5, 5).map(float), max_size=9))
def test_the_p_value_counts_all_signs(differences):
    assert signed_rank_p(torch.tensor(differences)) == pytest.approx(brute_force_p(differences))


def losses(own: float, dropped: float, placebo: float, samples: int = 20, spread: float = 0.3) -> list[torch.Tensor]:
    """Own, dropped, placebo and random losses around these means."""
    generator = torch.Generator().manual_seed(samples)
    return [mean + spread * torch.randn(samples, generator=generator) for mean in (own, dropped, placebo, dropped)]


@pytest.mark.parametrize(
    ("under", "twins", "verdict"),
    [
        ((0.5, 3.0, 2.8), 3.0, "isolated"),
        ((0.5, 3.0, 1.2), 3.0, "partly"),  # the pool is off the distribution: another's sinks tell the truth
        ((0.5, 1.2, 3.0), 3.0, "partly"),
        ((0.5, 3.0, 0.5), 3.0, "sinks are empty"),  # dropping hurts, but any other sinks do as well as the own
        ((0.5, 0.6, 0.6), 3.0, "sinks are empty"),
        ((0.5, 3.0, 0.6), 9.0, "sinks are empty"),
        ((0.5, 3.0, 2.8), math.nan, "partly"),  # unknown how much there was to lose
        ((0.5, 3.0, 0.5), math.nan, "sinks are empty"),
        ((3.0, 3.0, 3.0), 2.0, "sinks are empty"),  # nothing was learned
    ],
)
def test_the_verdict_follows_the_losses(under, twins, verdict):
    found = certify(*losses(*under), torch.full((20,), twins))
    assert found.verdict == verdict
    assert found.words().lower().startswith(verdict)
    assert "nan" not in found.words() and "\n" not in found.words()
    assert Certificate(**found.state()) == found


def test_content_is_the_share_of_what_was_learned_that_goes_with_the_sinks():
    own, dropped, random = torch.zeros(10), torch.full((10,), 3.0), torch.full((10,), 9.0)
    found = certify(own, dropped, torch.full((10,), 1.0), random, torch.full((10,), 4.0))
    assert found.content == pytest.approx(0.25)
    assert (found.own, found.dropped, found.placebo, found.random, found.twins) == (0, 3, 1, 9, 4)


def test_losses_that_are_not_finite_and_samples_without_a_twin_are_left_out():
    own, dropped, placebo, random = losses(0.5, 3.0, 2.8)
    twins = torch.full((20,), 3.0)
    twins[:5], own[5], dropped[6], placebo[7] = torch.nan, torch.nan, torch.inf, torch.nan
    found = certify(own, dropped, placebo, random, twins, {"own": torch.arange(20) > 7})
    rest = certify(own[8:], dropped[8:], placebo[8:], random[8:], twins[8:])
    assert (found.samples, found.content, found.exact["own"]) == (17, pytest.approx(rest.content), 12 / 17)


@pytest.mark.parametrize("samples", [0, 1, FEWEST - 1])
def test_too_few_samples_get_no_verdict(samples):
    found = certify(*losses(0.5, 3.0, 2.8, samples), torch.full((samples,), 3.0))
    assert found.verdict == "too few samples" and f"{samples} seen twice" in found.words()


def test_one_value_a_sample_is_asked_for_under_every_mask():
    with pytest.raises(ValueError, match=r"one value a sample under every mask.*'placebo': \[3\]"):
        certify(torch.zeros(4), torch.zeros(4), torch.zeros(3), torch.zeros(4))


# What it is measured on -----------------------------------------------------------------------------------------------


def batch_of(ids: list[int], exposures: list[int]) -> KeptBatch:
    numbers = torch.tensor(ids)
    return KeptBatch({}, numbers, numbers, torch.tensor(exposures))


def test_the_most_exposed_batches_are_kept_and_of_equals_the_last():
    kept = MostExposed(4)
    kept.add(batch_of([1, 2], [1, 1]))  # no sample was seen twice
    assert not kept.batches
    for batch, exposures in enumerate([[9, 9], [2, 2], [2, 2], [5, 1], [2, 2]]):
        kept.add(batch_of([2 * batch, 2 * batch + 1], exposures))
    assert [batch.ids.tolist() for batch in kept.batches] == [[0, 1], [6, 7]]
    for _ in range(99):  # the same two again and again
        kept.add(batch_of([0, 1], [50, 50]))
    assert sum(len(batch.ids) for batch in kept.batches) <= 4 * 4 + 2
    nothing = MostExposed(0)
    nothing.add(batch_of([1], [5]))
    assert not nothing.batches


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 2), min_size=1, max_size=8))
def test_a_placebo_is_always_another_sample_and_a_trained_one_if_there_is_one(ids):
    given_ids = torch.tensor(ids)
    others = placebo(given_ids)(given_ids)
    assert (others != given_ids).all()
    assert len(set(ids)) == 1 or set(others.tolist()) == set(ids)
    assert torch.equal(placebo(given_ids)(given_ids[:, None]), others[:, None])


def test_twins_are_the_nearest_controls_and_none_where_none_is_near():
    table = ControlTable()
    assert twin_losses(torch.zeros(2, 1), table).isnan().all()
    features = torch.arange(40.0)[:, None]
    table.record(0, torch.arange(40), features[:, 0] / 10, features)
    found = twin_losses(torch.tensor([[20.0], [500.0]]), table)
    assert found[0].item() == pytest.approx(2.0, abs=0.06) and found[1].isnan()
    assert twin_losses(torch.zeros(2, 3), table).isnan().all()
    without = ControlTable()
    without.record(0, torch.arange(40), features[:, 0], torch.zeros(40, 0))
    assert twin_losses(torch.zeros(2, 0), without).tolist() == [19.5, 19.5]
