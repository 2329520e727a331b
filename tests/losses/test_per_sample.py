"""Per-sample losses as the user reports them, and how calls fold and merge."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_memsink.losses.loss_call import LossCall, LossRows
from lightning_memsink.losses.per_sample import SampleAxisLost, fold, per_sample, terms_of, weigh


def test_a_report_differentiates_the_mean_and_keeps_no_graph():
    losses = torch.tensor([1.0, 3.0], requires_grad=True) * 1.0
    report = per_sample(losses, torch.tensor([5, 9]))
    assert report["loss"].requires_grad and report["loss"] == 2.0
    assert not report["memsink/losses"].requires_grad
    assert report["memsink/ids"].tolist() == [5, 9]


def test_a_report_of_tokens_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"one loss per sample, \[B\], but got \[2, 3\]. Average each sample first"):
        per_sample(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="got 2 losses but 3 ids"):
        per_sample(torch.zeros(2), torch.arange(3))


def call(losses, weights, **rows):
    upstream = torch.tensor(1.0)
    return LossCall("cross_entropy", 5, losses, weights, weights.sum(), upstream, LossRows(**rows))


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 5), tokens=st.integers(1, 5), seed=st.integers(0, 2**16), time_major=st.booleans())
def test_a_samples_loss_is_the_weighted_mean_over_its_elements(batch, tokens, seed, time_major):
    """A loop over samples is the oracle. Where B is T nothing tells time-major rows apart."""
    generator = torch.Generator().manual_seed(seed)
    losses, weights = torch.rand(2, batch, tokens, generator=generator)
    weights = (weights - 0.3).clamp(min=0)
    expected = torch.stack([(a * w).sum() / w.sum() for a, w in zip(losses, weights, strict=True)])
    if time_major and batch != tokens:
        got = fold(call(losses.t().reshape(-1), weights.t().reshape(-1), sizes=((tokens, batch),)), batch).means()
    else:
        got = fold(call(losses.reshape(-1), weights.reshape(-1)), batch).means()
    assert_close(got, expected, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 4), tokens=st.integers(1, 5), piece=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_pieces_of_one_buffer_find_their_samples(batch, tokens, piece, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(batch * tokens, generator=generator)
    calls = [
        LossCall(
            "cross_entropy", 5, part, None, 1.0, torch.tensor(0.1), LossRows(buffer=(1, number * piece, batch * tokens))
        )
        for number, part in enumerate(losses.split(piece))
    ]
    terms = terms_of(calls, batch)
    assert_close(weigh(terms), losses.view(batch, tokens).mean(1))


def test_rows_that_are_no_multiple_of_the_batch_are_refused():
    with pytest.raises(SampleAxisLost, match=r"cross_entropy was computed on \[7\] elements, not on 4 samples"):
        fold(call(torch.rand(7), torch.ones(7)), 4)


def test_copies_of_a_call_are_summed_once_and_each_has_its_own_scale():
    call = LossCall("cross_entropy", 3, torch.tensor([1.0, 2.0, 3.0, 4.0]), divisor=4.0, upstream=torch.tensor(1.0))
    twin = copy(call)
    twin.upstream = torch.tensor(2.0)
    first, second = fold(call, 2), fold(twin, 2)
    assert second.sums is first.sums and (first.scale, second.scale) == (0.25, 0.5)
    assert fold(call, 4).sums.tolist() == [1, 2, 3, 4] and fold(call, 2).sums.tolist() == [3, 7]
    by_element = fold(replace(call, upstream=torch.tensor([1.0, 0.0, 1.0, 1.0])), 2)
    assert by_element.sums.tolist() == [1, 7] and by_element.weights.tolist() == [1, 2]
    assert fold(replace(call, upstream=None), 2).weights.tolist() == [0, 0]
    assert fold(call, 2, samples=torch.tensor([1, 0, 0, 0])).sums.tolist() == [9, 1]
