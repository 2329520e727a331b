"""Localizers: methods that score which units carry given samples, with one interface.

To add one, decorate a function with `localizer` in a module that is imported here: it is in `METHODS` then.
"""

from lightning_memsink.localization.localizers.attribution_methods import DEFAULT
from lightning_memsink.localization.localizers.pruning import hard_concrete, slimming
from lightning_memsink.localization.localizers.reference import random_scores, weight_norm
from lightning_memsink.localization.localizers.task import METHODS, Batch, Localizer, Scores, Task, localizer

__all__ = [
    "DEFAULT",
    "METHODS",
    "Batch",
    "Localizer",
    "Scores",
    "Task",
    "hard_concrete",
    "localizer",
    "random_scores",
    "slimming",
    "weight_norm",
]
