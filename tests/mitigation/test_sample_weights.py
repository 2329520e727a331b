"""Weights by latched ids, and the window of loss truncation, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memsink.mitigation.loss_truncation import above_quantile, extend_window
from lightning_memsink.mitigation.sample_weights import SampleWeights, is_latched, latch, latched_weights

any_id = st.integers(-(2**63), 2**63 - 1)


@given(latched=st.lists(any_id, max_size=8), more=st.lists(any_id, max_size=8), others=st.lists(any_id, max_size=8))
def test_latched_ids_are_those_ever_flagged(latched, more, others):
    known = latch(latch(torch.zeros(0, dtype=torch.int64), torch.tensor(latched).long()), torch.tensor(more).long())
    ids = torch.tensor([*others, *more]).long()
    expected = [each in {*latched, *more} for each in ids.tolist()]
    assert known.tolist() == sorted({*latched, *more})
    assert is_latched(ids, known).tolist() == expected
    assert latched_weights(ids, known, 0.25).tolist() == [0.25 if each else 1.0 for each in expected]


def test_what_is_left_out_is_weighed_by_the_coefficients():
    weights = SampleWeights(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.5, 0.25, 0.25]))
    assert weights.left_out() == (2, pytest.approx(0.375))
    assert SampleWeights(torch.ones(3)).left_out() == (0, 0.0)
    assert SampleWeights(torch.zeros(1), torch.tensor([torch.nan])).left_out() == (1, 0.0), "no share is known"


def test_the_window_keeps_the_last_finite_losses_and_truncates_nothing_before_it_is_full():
    recent = extend_window(torch.zeros(0), [torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 3.0])], 3)
    assert recent.tolist() == [1, 2, 3]
    assert not above_quantile(torch.tensor([9.0]), recent[:2], 0.5, 3).any()
    assert above_quantile(torch.tensor([1.0, 2.0, 9.0]), recent, 0.5, 3).tolist() == [False, False, True]
    assert extend_window(recent, [torch.tensor([4.0])], 3).tolist() == [2, 3, 4]
