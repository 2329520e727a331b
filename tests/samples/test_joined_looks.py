"""Losses of a second look that belong to one sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor

from lightning_memsink.samples.joined_looks import join_looks

NAN = torch.nan


def joined(samples: list[int], losses: list[float], elements: list[int], rows: list[int], windows: list[int]) -> Tensor:
    found, means = join_looks(*map(tensor, (samples, losses, elements, rows, windows)))
    return dict(zip(found.tolist(), means.tolist(), strict=True))


def test_a_sample_measured_twice_has_its_first_finite_loss():
    found = joined([4, 2, 4, 2, 9], [NAN, 1.0, 3.0, 5.0, NAN], [1] * 5, [0, 1, 0, 1, 2], [1, 1, 1, 1, 0])
    assert found == {2: 1.0, 4: 3.0, 9: pytest.approx(NAN, nan_ok=True)}


def test_a_document_in_windows_has_the_mean_over_all_their_elements_each_once():
    found = joined([7, 7, 7, 3, 7], [1.0, 4.0, 1.0, 2.0, NAN], [10, 30, 10, 5, 8], [0, 1, 0, 5, 2], [3, 3, 3, 1, 3])
    assert found == {3: 2.0, 7: pytest.approx((10 + 120) / 40)}


def test_a_document_of_which_windows_are_missing_is_left_out():
    assert joined([7, 7, 3], [1.0, 4.0, 2.0], [1, 1, 1], [0, 0, 5], [2, 2, 1]) == {3: 2.0}


def test_windows_without_a_finite_loss_have_none():
    found = joined([7, 7], [NAN, NAN], [1, 1], [0, 1], [2, 2])
    assert found == {7: pytest.approx(NAN, nan_ok=True)}


def test_of_nothing_there_is_nothing():
    assert joined([], [], [], [], []) == {}
