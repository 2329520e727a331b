"""Elements are added to the samples that own them, whatever their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_memsink.losses.row_orders import NotWatched, RowOrders
from lightning_memsink.losses.sample_rows import Runs, SampleRows
from lightning_memsink.losses.unreadable import UnreadableLoss

SMALL = st.integers(1, 4)


def by_loop(values, owners, size):
    sums = torch.zeros(size)
    for value, owner in zip(values.flatten(), owners.expand(values.shape).flatten(), strict=True):
        if owner >= 0:
            sums[owner] += value
    return sums


@settings(max_examples=60, deadline=None)
@given(repeats=SMALL, first=st.integers(0, 2), count=SMALL, length=SMALL, after=st.integers(0, 2))
def test_regular_orders_are_recognized_and_folded(repeats, first, count, length, after):
    runs = Runs(repeats, first, count, length)
    owners = runs.owners()
    found = Runs.of(owners)
    assert found is not None and torch.equal(found.owners(), owners)
    size, values = first + count + after, torch.rand(len(owners))
    assert_close(SampleRows(owners).fold(values, size), by_loop(values, owners, size))


@settings(max_examples=60, deadline=None)
@given(
    owners=st.lists(st.integers(-1, 3), min_size=1, max_size=12),
    extents=st.lists(st.integers(1, 3), max_size=2),
    axis=st.integers(0, 2),
)
def test_any_owners_are_folded_as_a_loop_would(owners, extents, axis):
    shape = [*extents]
    shape.insert(min(axis, len(shape)), len(owners))
    flat = [1] * len(shape)
    flat[min(axis, len(extents))] = len(owners)
    rows, values = SampleRows(torch.tensor(owners).reshape(flat)), torch.rand(shape)
    assert_close(rows.fold(values, 4), by_loop(values, rows.owners, 4))


def test_weights_of_samples_reach_their_elements_and_no_others():
    rows = SampleRows(torch.tensor([[1, -1, 0]]))
    spread = rows.spread(torch.tensor([0.5, 0.0]), torch.Size((2, 3)))
    assert spread.tolist() == [[0.0, 1.0, 0.5]] * 2


def learned(*seen):
    orders = RowOrders()
    for runs, size in seen:
        shape = torch.Size((len(runs.owners()),))
        assert orders.learn("step", [SampleRows(runs.owners())], [shape], size)
    return orders


def order_of(orders, elements, size):
    (rows,) = orders.of("step", [torch.Size((elements,))], size)
    return rows.runs


def test_an_order_is_only_carried_to_sizes_that_leave_no_choice():
    batch_major = learned((Runs(1, 0, 4, 6), 4))
    assert order_of(batch_major, 24, 4) == Runs(1, 0, 4, 6)
    assert order_of(batch_major, 18, 3) == Runs(1, 0, 3, 6)  # a last batch: as long, so both readings agree
    assert order_of(batch_major, 28, 4) == Runs(1, 0, 4, 7)  # seven is no multiple of six
    with pytest.raises(NotWatched):
        order_of(batch_major, 48, 4)  # runs of twelve, or two rounds of six
    assert not batch_major.are_general
    pinned = learned((Runs(1, 0, 4, 6), 4), (Runs(1, 0, 4, 7), 4))
    assert pinned.are_general and order_of(pinned, 36, 4) == Runs(1, 0, 4, 9)
    time_major = learned((Runs(6, 0, 4, 1), 4), (Runs(7, 0, 4, 1), 4))
    assert time_major.are_general and order_of(time_major, 36, 4) == Runs(9, 0, 4, 1)


def test_steps_that_differ_where_they_should_not_are_a_conflict():
    orders = learned((Runs(1, 0, 4, 4), 4))
    orders.learn("step", [SampleRows(Runs(4, 0, 4, 1).owners())], [torch.Size((16,))], 4)
    assert orders.has_conflict
    orders = learned((Runs(1, 0, 4, 4), 4))
    orders.refuse("step", "rows of different samples")
    assert orders.has_conflict
    refused = RowOrders()
    refused.refuse("step", "mixed")
    with pytest.raises(UnreadableLoss, match=r"^mixed$"):
        refused.of("step", [torch.Size((4,))], 4)
    assert not refused.has_conflict


def test_parts_of_a_batch_are_known_for_their_own_sizes_only():
    orders = learned((Runs(1, 2, 2, 3), 4))
    assert order_of(orders, 6, 4) == Runs(1, 2, 2, 3)
    for elements, size in ((6, 5), (12, 4)):
        with pytest.raises(NotWatched):
            order_of(orders, elements, size)
