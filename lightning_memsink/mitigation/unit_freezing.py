"""Holding slices of parameters back while an optimizer moves everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_memsink.mitigation.unit_parameters import UnitSlice

MEANS = ("momentum_buffer", "exp_avg")
"""Names under which torch's optimizers keep a running mean of gradients: the direction of a step."""


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def slices_in(slices: Iterable[UnitSlice], optimizer: Optimizer) -> list[UnitSlice]:
    """Those of parameters that ``optimizer`` moves."""
    own = set(map(id, parameters_of(optimizer)))
    return [each for each in slices if id(each.parameter) in own and each.parameter.requires_grad]


def squared_norms(slices: Sequence[UnitSlice], parameters: Iterable[nn.Parameter]) -> tuple[float, float]:
    """Squared norm of the gradient in ``slices``, and of all of it; zeros if that is not finite."""
    inside = [each.of(each.parameter.grad) for each in slices if each.parameter.grad is not None]
    overall = [parameter.grad for parameter in parameters if parameter.grad is not None]
    part, whole = (float(get_total_norm(gradients)) ** 2 if gradients else 0.0 for gradients in (inside, overall))
    return (part, whole) if isfinite(whole) else (0.0, 0.0)


@torch.no_grad()
def zero_gradients_(slices: Iterable[UnitSlice]) -> None:
    """Before clipping, so that the norm it clips by is that of what moves."""
    for each in slices:
        if each.parameter.grad is not None:
            each.zero_(each.parameter.grad)


class FrozenSlices:
    """What ``slices`` were before one step of ``optimizer``, and what its state of them was."""

    @torch.no_grad()
    def __init__(self, slices: Sequence[UnitSlice], optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._values = [(each, each.of(each.parameter)) for each in slices]
        self._state = [
            {name: each.of(kept) for name, kept in self._state_of(each).items() if name not in MEANS} for each in slices
        ]

    @torch.no_grad()
    def freeze_(self) -> None:
        """After the step: the values are what they were, bit by bit, and so are running squares; running means are 0.

        Units that are let go later must not be kicked: a mean that stood since the freeze would move them in a
        direction long past, and squares that decayed beside zero gradients would make their first steps too large.
        """
        for (each, value), before in zip(self._values, self._state, strict=True):
            each.put_(each.parameter, value)
            for name, kept in self._state_of(each).items():
                if name in MEANS:
                    each.zero_(kept)
                elif name in before:
                    each.put_(kept, before[name])

    @torch.no_grad()
    def scale_(self, rest: float) -> None:
        """After the step: the values moved by ``rest`` (0…1) of it. The optimizer's state stays its own."""
        # All are read before one is written: a parameter may hold units along both of its axes.
        moved = [torch.lerp(value, each.of(each.parameter), rest) for each, value in self._values]
        for (each, _), value in zip(self._values, moved, strict=True):
            each.put_(each.parameter, value)

    def _state_of(self, each: UnitSlice) -> dict[str, Tensor]:
        """By name, what the optimizer keeps of every number of the parameter."""
        state = self._optimizer.state.get(each.parameter, {})
        return {
            name: kept
            for name, kept in state.items()
            if isinstance(kept, Tensor) and kept.shape == each.parameter.shape
        }
