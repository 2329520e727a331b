"""Frozen numbers start from rest when they are released, whatever the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_memsink.mitigation.unit_freezing import FrozenSlices, squared_norms, zero_gradients_
from lightning_memsink.mitigation.unit_parameters import UnitSlice
from tests.support.optimizers import OPTIMIZERS


class Frozen:
    """A weight of two numbers, of which the first is held for a while."""

    def __init__(self, optimizer: Any) -> None:
        self.weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.optimizer = optimizer([self.weight])
        self.slices = [UnitSlice(self.weight, 0, torch.tensor([0]))]

    def step(self, gradient: float, held: bool) -> None:
        self.weight.grad = torch.tensor([0.0 if held else gradient, gradient])
        before = FrozenSlices(self.slices, self.optimizer)
        self.optimizer.step()
        if held:
            before.freeze_()


@pytest.mark.parametrize("name", ["momentum and decay", "Adam and decay", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("steps", [1, 300])
def test_released_units_start_from_rest(name, steps):
    """However long they were frozen: no momentum from before the freeze, no step larger than one of the training."""
    run = Frozen(OPTIMIZERS[name])
    largest = 0.0
    for _ in range(20):
        before = run.weight.detach().clone()
        run.step(-1.0, held=False)
        largest = max(largest, float((run.weight.detach() - before).abs().max()))
    frozen_weight = run.weight.detach().clone()
    for _ in range(steps):
        run.step(-1.0, held=True)
    assert torch.equal(run.weight[0], frozen_weight[0])
    run.step(1.0, held=False)
    assert -largest <= run.weight[0] - frozen_weight[0] < 0, "it follows the new gradient at once, no further than ever"


def test_a_parameter_that_holds_units_along_both_axes_moves_by_the_rest_once():
    weight = nn.Parameter(torch.zeros(3, 3))
    slices = [UnitSlice(weight, 0, torch.tensor([1])), UnitSlice(weight, 1, torch.tensor([1]))]
    weight.grad = torch.full((3, 3), -1.0)
    optimizer = torch.optim.SGD([weight], 1.0)
    before = FrozenSlices(slices, optimizer)
    optimizer.step()
    before.scale_(0.25)
    assert weight.tolist() == [[1, 0.25, 1], [0.25, 0.25, 0.25], [1, 0.25, 1]]


def test_a_parameter_without_a_gradient_has_no_norm_and_nothing_to_zero():
    weight = nn.Parameter(torch.zeros(3))
    slices = [UnitSlice(weight, 0, torch.tensor([1]))]
    zero_gradients_(slices)
    assert squared_norms(slices, [weight]) == (0.0, 0.0) and weight.grad is None
