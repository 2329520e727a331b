"""Freezes slices of parameters, or shortens their steps, while an optimizer moves everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_memsink.mitigation.unit_parameters import UnitSlice

RUNNING_MEANS = ("momentum_buffer", "exp_avg")
"""Names of the states of torch's optimizers that are a running mean of gradients: the direction of a step."""


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters that ``optimizer`` moves, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def slices_in(slices: Iterable[UnitSlice], optimizer: Optimizer) -> list[UnitSlice]:
    """The ``slices`` of trainable parameters that ``optimizer`` moves."""
    own = set(map(id, parameters_of(optimizer)))
    return [each for each in slices if id(each.parameter) in own and each.parameter.requires_grad]


def squared_norms(slices: Sequence[UnitSlice], parameters: Iterable[nn.Parameter]) -> tuple[float, float]:
    """Squared norm of the gradient in ``slices``, and of that of all ``parameters``; zeros if the latter is not finite.

    Waits for the device.
    """
    inside = [each.of(each.parameter.grad) for each in slices if each.parameter.grad is not None]
    overall = [parameter.grad for parameter in parameters if parameter.grad is not None]
    part, whole = (float(get_total_norm(gradients)) ** 2 if gradients else 0.0 for gradients in (inside, overall))
    return (part, whole) if isfinite(whole) else (0.0, 0.0)


@torch.no_grad()
def zero_gradients_(slices: Iterable[UnitSlice]) -> None:
    """Zeroes the gradient in ``slices``. Before clipping, whose norm is then that of the weights that move."""
    for each in slices:
        if each.parameter.grad is not None:
            each.zero_(each.parameter.grad)


class FrozenSlices:
    """The values of ``slices`` before one step of ``optimizer``, and the optimizer's state of them."""

    @torch.no_grad()
    def __init__(self, slices: Sequence[UnitSlice], optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._values = [(each, each.of(each.parameter)) for each in slices]
        self._state = [
            {name: each.of(values) for name, values in self._state_of(each).items() if name not in RUNNING_MEANS}
            for each in slices
        ]

    @torch.no_grad()
    def freeze_(self) -> None:
        """After the step: restores the values and running squares bit by bit, and sets running means to 0.

        So the first steps of a unit that is released later are ordinary ones. A mean kept since the freeze would move
        it in an outdated direction, and squares that decayed under zero gradients would make its steps too large.
        """
        for (each, value), before in zip(self._values, self._state, strict=True):
            each.put_(each.parameter, value)
            for name, values in self._state_of(each).items():
                if name in RUNNING_MEANS:
                    each.zero_(values)
                elif name in before:
                    each.put_(values, before[name])

    @torch.no_grad()
    def scale_(self, rest: float) -> None:
        """After the step: leaves the values with the share ``rest`` (0…1) of it. The optimizer's state is unchanged."""
        # All slices are read before the first is written: a parameter may hold units along both of its axes.
        moved = [torch.lerp(value, each.of(each.parameter), rest) for each, value in self._values]
        for (each, _), value in zip(self._values, moved, strict=True):
            each.put_(each.parameter, value)

    def _state_of(self, each: UnitSlice) -> dict[str, Tensor]:
        """By name, the optimizer's states that have the shape of the parameter."""
        state = self._optimizer.state.get(each.parameter, {})
        return {
            name: value
            for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == each.parameter.shape
        }
