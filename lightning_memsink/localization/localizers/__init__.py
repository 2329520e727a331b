"""Ways to score which units carry given samples: one interface, so that anybody's own can be judged beside them."""

from collections.abc import Mapping
from functools import partial

from lightning_memsink.localization.localizers.attribution_methods import (
    activation_times_gradient,
    activations,
    integrated_gradients,
    random_scores,
    weight_norm,
    zero_out,
)
from lightning_memsink.localization.localizers.pruning import hard_concrete, slimming
from lightning_memsink.localization.localizers.task import Batch, Localizer, Scores, Task

DEFAULT = "activation x gradient"

METHODS: Mapping[str, Localizer] = {
    DEFAULT: activation_times_gradient,
    "activation x gradient, margin": partial(activation_times_gradient, objective="margin"),
    "activation x gradient, less controls": partial(activation_times_gradient, contrasted=True),
    "|activation x gradient|, less controls": partial(activation_times_gradient, signed=False, contrasted=True),
    "activations": activations,
    "integrated gradients": integrated_gradients,
    "zero-out": zero_out,
    "slimming": slimming,
    "hard concrete": hard_concrete,
    "weight norm": weight_norm,
    "random": random_scores,
}
"""By name. All leave the model as it was: weights bit-identical, gradients, modes and random generators untouched."""

__all__ = ["DEFAULT", "METHODS", "Batch", "Localizer", "Scores", "Task"]
