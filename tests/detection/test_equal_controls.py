"""Controls that can't tell samples apart are noticed, and others are not."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_memsink.detection.equal_controls import controls_are_equal

GENERATOR = torch.Generator().manual_seed(3)


def normal(count, mean, sd):
    return mean + sd * torch.randn(count, generator=GENERATOR)


EQUAL = {
    "all the same": torch.full((50,), 2.3),
    "but for rounding": normal(50, 2.3, 1e-6),
    "but for a few": torch.cat([torch.full((46,), 2.3), normal(4, 5.0, 1.0)]),
    "all zero": torch.zeros(50),
    "two rows repeated": torch.tensor([1.0, 4.0]).repeat(25),
    "two": torch.tensor([2.3, 2.3]),
    "negative": torch.full((50,), -7.0),
    "some not finite": torch.tensor([2.3, math.nan, 2.3, math.inf, 2.3]),
}
DIFFERENT = {
    "ordinary": normal(50, 2.3, 0.3),
    "narrow": normal(50, 2.3, 0.02),
    "tiny, and of all sizes": normal(50, -9.0, 1.0).exp(),
    "half beyond a margin": torch.cat([torch.zeros(25), normal(25, 0.5, 0.2).abs()]),
    "around zero": normal(50, 0.0, 0.1),
    "three": torch.tensor([1.0, 2.0, 3.0]),
    "two": torch.tensor([1.0, 2.0]),
    "one": torch.tensor([1.0]),
    "none": torch.zeros(0),
    "none that is finite": torch.tensor([math.nan, math.nan, math.inf]),
}


@pytest.mark.parametrize("losses", EQUAL.values(), ids=EQUAL)
def test_equal_losses_are_noticed(losses):
    assert controls_are_equal(losses)


@pytest.mark.parametrize("losses", DIFFERENT.values(), ids=DIFFERENT)
def test_others_are_not(losses):
    assert not controls_are_equal(losses)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_scale_of_a_loss_makes_no_difference(factor):
    assert controls_are_equal(factor * EQUAL["but for rounding"])
    assert not controls_are_equal(factor * DIFFERENT["ordinary"])
