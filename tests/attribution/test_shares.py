"""Shares of effects keep their bits in range and do not overflow, and values are divided by weights without NaN."""

from __future__ import annotations

import pytest
import torch

from lightning_memsink.attribution.unit_effects import divide_by_weights, shares


def test_signed_shares_keep_the_sign_and_their_sizes_sum_to_one():
    effects = {"a": torch.tensor([[1.0, -2.0], [0.0, 0.0]]), "b": torch.tensor([[5.0], [0.0]])}
    result = shares(effects, signed=True)
    assert result["a"].tolist() == [[0.125, -0.25], [0.0, 0.0]] and result["b"].tolist() == [[0.625], [0.0]]


@pytest.mark.parametrize("signed", [False, True])
def test_effects_whose_sum_overflows_have_shares(signed):
    effects = {"a": torch.tensor([[3e38], [1.0]]), "b": torch.tensor([[-3e38], [-1.0]])}
    result = shares(effects, signed)
    assert result["a"].tolist() == [[0.5], [0.5]] and result["b"].abs().tolist() == [[0.5], [0.5]]
    assert bool((result["b"] < 0).all()) is signed


def test_signed_shares_in_range_are_divided_once():
    """Localized units depend on the last bit, so only rows that would overflow are scaled before their sum."""
    effects = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-16, 17)
    effects[0] = 3e38
    expected = effects[1:] / effects[1:].abs().sum(1, keepdim=True)
    assert torch.equal(shares({"a": effects}, signed=True)["a"][1:], expected)


@pytest.mark.parametrize(("power", "expected"), [(1, [[0.0, 0.0], [1.5, -3.0]]), (2, [[0.0, 0.0], [0.75, -1.5]])])
def test_values_of_a_sample_without_weight_are_zero(power, expected):
    values = torch.tensor([[1.0, torch.inf], [3.0, -6.0]])
    assert divide_by_weights(values, torch.tensor([0.0, 2.0]), power).tolist() == expected
