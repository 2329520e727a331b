"""Targets tell whose rows a loss call has, or nothing is said."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from lightning_memsink.losses.sample_rows import SampleRows
from lightning_memsink.losses.target_rows import place_of, rows_of_target

B, T = 4, 6
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, 50, (B, T), generator=GENERATOR)
SQUARE = torch.randint(0, 50, (B, B), generator=GENERATOR)
ROWS = torch.arange(B)[:, None]


def leaves(tensor):
    return [(tensor, torch.arange(len(tensor)).reshape(-1, *[1] * (tensor.ndim - 1)))]


LAYOUTS = {
    "flat": (lambda y: y.reshape(-1), lambda o: o.reshape(-1)),
    "time-major": (lambda y: y.T.reshape(-1), lambda o: o.T.reshape(-1)),
    "shifted": (lambda y: y[:, 1:].reshape(-1), lambda o: o[:, 1:].reshape(-1)),
    "shifted and padded": (
        lambda y: pad(y, (0, 1), value=-100)[:, 1:].contiguous().view(-1),
        lambda o: o.reshape(-1),
    ),
    "a part": (lambda y: y[1:3], lambda o: o[1:3]),
    "every other column": (lambda y: y[:, ::2], lambda o: o[:, ::2]),
    "transposed": (lambda y: y.T, lambda o: o.T),
}


@pytest.mark.parametrize("labels", [LABELS, SQUARE], ids=["T not B", "T is B"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_of_the_targets(name, labels):
    layout, of_owners = LAYOUTS[name]
    rows = rows_of_target(layout(labels), leaves(labels), B)
    assert isinstance(rows, SampleRows), rows
    expected = of_owners(ROWS.expand(labels.shape))
    assert torch.equal(rows.owners.expand(expected.shape), expected)


def test_copies_are_told_by_their_values_and_views_by_their_place():
    constant = torch.ones(B, T, dtype=torch.int64)
    assert isinstance(rows_of_target(constant.view(-1), leaves(constant), B), SampleRows)
    assert isinstance(rows_of_target(LABELS.clone().view(-1).float(), leaves(LABELS), B), SampleRows)
    assert place_of(LABELS[1], [LABELS]) == (0, T)
    assert place_of(LABELS.clone(), [LABELS]) is None


@pytest.mark.parametrize(
    ("target", "labels", "reason"),
    [
        (LABELS[torch.tensor([2, 0, 3, 1])], LABELS, "not those of the batch"),
        (torch.ones(B, B, dtype=torch.int64).view(-1), torch.ones(B, B, dtype=torch.int64), "several orders"),
        (torch.ones(B), torch.ones(B), "several orders"),
        (torch.rand(B, T), LABELS, "not those of the batch"),
        (None, LABELS, "not of the batch"),
    ],
    ids=["permuted", "a copy of one value", "one class", "noise", "none"],
)
def test_other_targets_say_nothing(target, labels, reason):
    copied = None if target is None else target.clone()
    found = rows_of_target(copied, leaves(labels.clone()), B)
    assert isinstance(found, str) and reason in found


def test_all_rows_of_a_batch_of_one_are_its_sample():
    rows = rows_of_target(torch.rand(7), [], 1)
    assert isinstance(rows, SampleRows) and rows.owners.tolist() == [0]
