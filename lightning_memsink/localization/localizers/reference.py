"""Reference scores that a localizer should beat: the norm of a unit's weight, and chance.

U  units of a hidden layer
"""

from __future__ import annotations

import torch

from lightning_memsink.localization.localizers.attribution_methods import weight_norms
from lightning_memsink.localization.localizers.task import Scores, Task, localizer


@localizer("weight norm")
def weight_norm(task: Task) -> Scores:
    """``||w_j||`` alone, which depends on no sample: what a score that contains it gets for free."""
    return {layer.name: weight_norms(layer) for layer in task.layers}


@localizer("random")
def random_scores(task: Task, seed: int = 0) -> Scores:
    """Uniform scores in 0…1, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: torch.rand(layer.units, generator=generator) for layer in task.layers}
