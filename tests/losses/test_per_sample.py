"""Per-sample losses as the user reports them, and how calls fold and merge."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.per_sample import fold, in_batch_order, per_sample, terms_of, weigh
from lightning_memsink.losses.sample_rows import SampleAxisLost, SampleRows


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


def call(losses, weights, rows):
    upstream = torch.tensor(1.0)
    return LossCall("cross_entropy", 5, losses, weights, weights.sum(), upstream, rows)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 5), tokens=st.integers(1, 5), seed=st.integers(0, 2**16), time_major=st.booleans())
def test_a_samples_loss_is_the_weighted_mean_over_its_elements(batch, tokens, seed, time_major):
    """A loop over samples is the oracle, also where B is T."""
    generator = torch.Generator().manual_seed(seed)
    losses, weights = torch.rand(2, batch, tokens, generator=generator)
    weights = (weights - 0.3).clamp(min=0)
    expected = torch.stack([(a * w).sum() / w.sum() for a, w in zip(losses, weights, strict=True)])
    owners = torch.arange(batch)[:, None].expand(batch, tokens)
    parts = (part.t() if time_major else part for part in (losses, weights, owners))
    losses, weights, owners = (part.reshape(-1) for part in parts)
    assert_close(fold(call(losses, weights, SampleRows(owners)), batch).means(), expected, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 4), tokens=st.integers(1, 5), piece=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_pieces_of_one_loss_are_one_loss(batch, tokens, piece, seed):
    generator = torch.Generator().manual_seed(seed)
    losses, owners = torch.rand(batch * tokens, generator=generator), torch.arange(batch).repeat_interleave(tokens)
    weight = torch.tensor(1 / (batch * tokens))
    calls = [
        LossCall("cross_entropy", 5, part, None, 1.0, weight, SampleRows(own))
        for part, own in zip(losses.split(piece), owners.split(piece), strict=True)
    ]
    terms = terms_of(calls, batch)
    assert len(terms) == 1
    assert_close(weigh(terms), losses.view(batch, tokens).mean(1))


def test_rows_that_nothing_assigns_to_samples_are_refused_with_the_reason():
    unknown = replace(call(torch.rand(8), torch.ones(8), "x"), rows="its rows were mixed")
    with pytest.raises(SampleAxisLost, match=r"^cross_entropy: its rows were mixed$"):
        fold(unknown, 4)
    with pytest.raises(SampleAxisLost, match=r"^cross_entropy: nothing says which samples its rows are$"):
        fold(LossCall("cross_entropy", 5, torch.rand(8)), 4)


def test_calls_are_in_batch_order_only_where_their_rows_are_a_multiple_of_the_batch():
    whole, part = LossCall("mse_loss", 0, torch.rand(4, 2)), LossCall("mse_loss", 0, torch.rand(7))
    known = LossCall("mse_loss", 0, torch.rand(4), rows=SampleRows(torch.tensor([3, 2, 1, 0])))
    in_batch_order([whole, part, known], 4)
    assert whole.rows.owners.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert part.rows == "nothing says which samples its rows are"
    assert known.rows.owners.tolist() == [3, 2, 1, 0]


def test_copies_of_a_call_are_summed_once_and_each_has_its_own_scale():
    rows = SampleRows(torch.tensor([0, 0, 1, 1]))
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    call = LossCall("cross_entropy", 3, losses, divisor=4.0, upstream=torch.tensor(1.0), rows=rows)
    twin = copy(call)
    twin.upstream = torch.tensor(2.0)
    first, second = fold(call, 2), fold(twin, 2)
    assert second.sums is first.sums and (first.scale, second.scale) == (0.25, 0.5)
    assert fold(call, 4).sums.tolist() == [3, 7, 0, 0] and fold(call, 2).sums.tolist() == [3, 7]
    by_element = fold(replace(call, upstream=torch.tensor([1.0, 0.0, 1.0, 1.0])), 2)
    assert by_element.sums.tolist() == [1, 7] and by_element.weights.tolist() == [1, 2]
    assert fold(replace(call, upstream=None), 2).weights.tolist() == [0, 0]
    elsewhere = replace(call, rows=SampleRows(torch.tensor([1, 0, 0, 0])))
    assert fold(elsewhere, 2).sums.tolist() == [9, 1] and fold(call, 2).sums.tolist() == [3, 7]
