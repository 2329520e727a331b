"""Ownership recovery: a localizer finds the units that a sample owns by design, without access to the design.

The truth is exact and nothing is injected after training, which makes it the best test of a localizer.

N  samples      U  units of a layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_memsink.localization.evaluation.ranking import average_precision
from lightning_memsink.localization.localizers.task import Localizer, Task


@dataclass(frozen=True)
class OwnershipRecovery:
    """How well one localizer recovered the units of each sample."""

    precision: tuple[float, ...]
    """``N`` average precisions, 0…1."""
    chance: float
    """The expected precision of random scores: the share of ranked units that a sample owns."""

    @property
    def mean(self) -> float:
        return sum(self.precision) / len(self.precision)

    @property
    def times_chance(self) -> float:
        return self.mean / self.chance


def evaluate_ownership(
    localizer: Localizer,
    tasks: Sequence[Task],
    ownership: Mapping[str, Tensor],
    among: Mapping[str, Tensor] | None = None,
) -> OwnershipRecovery:
    """Gives ``localizer`` one sample at a time and compares its scores with the units that the sample owns.

    Args:
        localizer: gets each task without the ownership.
        tasks: ``N``, each with one sample as its targets.
        ownership: bool ``[N, U]`` by layer name: the units that were active for the sample in training. Layers
            without designed units are left out, and are not ranked.
        among: bool ``[U]`` by layer name: units to rank (the pool that owned units are drawn from); None: all.

    Raises:
        ValueError: the numbers of tasks and rows differ, or a sample owns no unit.
    """
    for name, masks in ownership.items():
        if len(masks) != len(tasks):
            raise ValueError(
                f"There are {len(tasks)} tasks, but ownership of {name} has {len(masks)} rows: pass one a task."
            )
    precision, chance = [], 0.0
    for row, task in enumerate(tasks):
        truth = {name: masks[row].cpu() for name, masks in ownership.items()}
        if not any(bool(own.any()) for own in truth.values()):
            raise ValueError(f"Sample {row} owns no unit, so there is nothing to find: leave it out.")
        scores = localizer(task)
        ranked = among or {name: own | True for name, own in truth.items()}
        precision.append(average_precision({name: scores[name] for name in truth}, truth, ranked))
        owned = sum(int((own & ranked[name].cpu()).sum()) for name, own in truth.items())
        chance += owned / sum(int(ranked[name].sum()) for name in truth) / len(tasks)
    return OwnershipRecovery(tuple(precision), chance)
