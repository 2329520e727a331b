"""Controls whose losses are all equal say nothing of what a sample of another difficulty would get."""

from __future__ import annotations

import torch
from torch import Tensor

NEARLY = 1e-6
"""Difference of two losses, as a share of their size, up to which they are the same."""


def controls_are_equal(losses: Tensor) -> bool:
    """Whether ``losses`` ``[M]`` of controls are all equal or nearly so, among those that are finite.

    They are if nine tenths of them lie within `NEARLY` of their median, or if they have two values at most: of a model
    that has not learned anything, of one row repeated, or of rows that all lie beyond a margin. Fewer than two finite
    losses are not equal: they are too few.
    """
    finite = losses[torch.isfinite(losses)].double().sort().values
    if len(finite) < 2:
        return False
    middle = finite[len(finite) // 2]
    are_near = (finite - middle).abs() <= NEARLY * middle.abs()
    if float(are_near.double().mean()) >= 0.9:
        return True
    steps = finite.diff() > NEARLY * finite[:-1].abs().maximum(finite[1:].abs())
    return len(finite) > 3 and int(steps.sum()) < 2
