"""A set point of `hold` that follows the run: how far below controls its ordinary samples stand, and a margin.

Over epochs the loss of everything that is trained on falls below that of what is not, and long before that does harm.
A sample is held where it stands further below than the others do. While controls still improve, what all samples have
in common is taken for learning; from their best evaluation on it is overfitting, and the set point follows it no more.

    M  controls      V  samples visited
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memsink.detection.feature_units import in_units
from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.matched_controls import MAX_REFERENCE, evenly
from lightning_memsink.mitigation.hold import Reference
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

MARGIN = 0.5
"""Nats (per token for token losses) by which a sample may stand further below its controls than samples usually do, at
least."""
CHANCE = 0.99
"""Share of the controls that stand no further below other controls than the margin is: by so much samples differ that
match."""
LEAST = 16
"""Samples that it takes to say where samples usually stand."""
PATIENCE = 4
"""Evaluations of the controls after which it should be measured."""
UNMEASURED = (
    "its set point could not be measured in {evaluations} evaluations of the controls. Two in a row must be of the "
    "same held-out samples, and samples that match them must be trained on in between. Or set it by hand, "
    "SampleGradientMask(at=0.75)"
)


class SetPoint:
    """The set point of a run, measured at each evaluation of its controls.

    Everything that it is measured from is in the ledger, so that a resumed run goes on exactly.
    """

    def __init__(self) -> None:
        self.value = math.inf
        """Nats; infinite before it was measured, so that nothing is held."""
        self.evaluations = 0
        """That were looked at."""
        self._step = -1  # of the last of them
        self._best_ids = torch.zeros(0, dtype=torch.int64)
        self._best = torch.zeros(0)

    @property
    def is_overdue(self) -> bool:
        """Whether it was not measured in as many evaluations as should do."""
        return self.evaluations >= PATIENCE and math.isinf(self.value)

    def update(self, table: LossTable, controls: ControlTable, k: int = 8) -> None:
        """Looks at the latest evaluation of ``controls``, once.

        Gaps are those that `hold` saw since the evaluation before: to the controls' losses then. So what a model learns
        between two evaluations is in them, as it will be until the next one. Controls are at their best when those that
        match most samples are: of kinds that few samples are of, such as numbers, losses may rise from the start.
        """
        if controls.latest_step <= self._step:
            return
        self._step, self.evaluations = controls.latest_step, self.evaluations + 1
        now = controls.unknown_to_the_model
        known = torch.equal(controls.ids, self._best_ids)
        found = compare(table, controls, self._best if known else torch.full_like(now, math.inf), k)
        if found is None or not float(found.change.median()) < 0:
            return
        self._best_ids, self._best = controls.ids.clone(), now.clone()
        by_chance = float(found.null.quantile(CHANCE) - found.null.median())
        self.value = max(0.0, float(found.gaps.median())) + max(MARGIN, by_chance)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FACTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _FACTS:
            setattr(self, name, state[name])


_FACTS = ("value", "evaluations", "_step", "_best_ids", "_best")


class Standing(NamedTuple):
    """How samples stand to their matched controls, in nats."""

    gaps: Tensor
    """``[V]`` loss of the controls at the evaluation before the latest, less that of the sample's last visit since."""
    change: Tensor
    """``[V]`` of the controls: their loss at the latest evaluation, less that at their best."""
    null: Tensor
    """``[M]`` gaps of the controls to other controls."""


def compare(table: LossTable, controls: ControlTable, best: Tensor, k: int = 8) -> Standing | None:
    """Compares the samples visited between the last two evaluations of ``controls``, at most `MAX_REFERENCE` of both.

    ``best``: ``[M]`` losses to measure the change from, infinite where there are none. None where nothing can be
    compared: fewer than `LEAST` samples with a matched control and a finite loss, too few controls, no features.
    """
    before = torch.where(controls.trained, torch.nan, controls.previous)
    is_known = torch.isfinite(before) & torch.isfinite(controls.latest) & ~torch.isnan(best)
    some = evenly(is_known.nonzero().flatten(), MAX_REFERENCE)
    visited = (table.last_step >= controls.previous_step) & torch.isfinite(table.last_loss)
    rows = evenly(visited.nonzero().flatten(), MAX_REFERENCE)
    if controls.previous_step >= controls.latest_step or controls.features.shape[1] != table.features.shape[1]:
        return None
    try:
        reference = Reference.of(controls.features[some], before[some], k)
    except ValueError:  # `hold` says so
        return None
    points = in_units(table.features[rows].float(), (reference.mean, reference.scale))
    index, apart = nearest(points, reference.points, k)
    matched = apart <= reference.limit
    if int(matched.sum()) < LEAST:
        return None
    index, rows = index[matched], rows[matched]
    return Standing(
        reference.losses[index].mean(1) - table.last_loss[rows],
        (controls.latest - best)[some][index].mean(1),
        reference.losses[reference.others].mean(1) - reference.losses,
    )
