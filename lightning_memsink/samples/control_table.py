"""The losses of held-out samples (controls), which the model never trained on, at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_memsink.samples.unique import first_of_each

ControlBatch: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""``ids`` and ``losses`` ``[B]``, ``features`` ``[B, F]`` of held-out samples; the elements of each loss ``[B]``, where
samples of one id may be windows of one document."""


class ControlTable:
    """The controls' losses at the last two evaluations, and their matching features.

    ``ids`` ``[M]`` int64; ``features`` ``[M, F]``; ``previous`` and ``latest`` ``[M]`` losses, NaN where a control had
    no finite one.
    """

    def __init__(self) -> None:
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.features = torch.zeros(0, 0)
        self.previous = torch.zeros(0)
        self.latest = torch.zeros(0)
        self.trained = torch.zeros(0, dtype=torch.bool)
        """Bool ``[M]``: controls that are samples which the model was trained on, and so say nothing."""
        self.previous_step = -1
        self.latest_step = -1
        self.curve: list[tuple[int, float, float]] = []
        """Step, mean and standard deviation of the losses, an entry an evaluation."""
        self.has_own_source = False
        """Whether controls come from a loader of their own, so that no validation is needed."""
        self.own_every: int | None = None
        """Steps between two evaluations where they are not those of a validation set."""
        self.own_samples: int | None = None
        """Held-out samples of a loader of their own; 0 without any held-out sample, None where that is unknown."""
        self.collected: list[ControlBatch] = []
        """Batches of the evaluation that is open, in this process."""
        self._open_step: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether an evaluation was begun and not closed."""
        return self._open_step is not None

    def begin(self, step: int) -> None:
        """Begins an evaluation at ``step``."""
        self.collected, self._open_step = [], step

    def add(self, ids: Tensor, losses: Tensor, features: Tensor, elements: Tensor | None = None) -> None:
        """Adds a batch to the open evaluation, as `ControlBatch` has it."""
        self.collected.append((ids, losses, features, elements))

    def close_evaluation(self, collected: Sequence[list[ControlBatch]]) -> None:
        """Ends the evaluation and records it. ``collected``: the attribute `collected` of every process's table.

        Raises:
            RuntimeError: if no evaluation was begun.
        """
        if self._open_step is None:
            raise RuntimeError("ControlTable.close_evaluation() without begin(step).")
        step, self._open_step, self.collected = self._open_step, None, []
        batches = [batch for process in collected for batch in process]
        if batches:
            ids, losses, features = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:3])
            elements = [batch[3] for batch in batches if batch[3] is not None]
            self.record(step, ids, losses, features, torch.cat(elements) if len(elements) == len(batches) else None)

    def __len__(self) -> int:
        return len(self.ids)

    def record(self, step: int, ids: Tensor, losses: Tensor, features: Tensor, elements: Tensor | None = None) -> None:
        """Records one evaluation of all controls: ``ids``, ``losses`` ``[M]``, ``features`` ``[M, F]``.

        A control that came twice counts once; with the number of ``elements`` ``[M]`` of each loss, its loss is the
        mean over the elements of all windows. If the controls are others than before, the history starts anew: a gap
        to the earlier controls would compare two populations.
        """
        losses = losses.float() if elements is None else _of_windows(ids, losses.float(), elements)
        ids, first = first_of_each(ids)
        losses, features = losses[first], features.float()[first]
        if torch.equal(ids, self.ids):
            self.previous, self.previous_step = self.latest, self.latest_step
        else:
            self.ids, self.curve = ids, []
            self.previous, self.previous_step = losses, step
            self.trained = torch.zeros(len(ids), dtype=torch.bool)
        finite = losses[torch.isfinite(losses)].double()
        if len(finite) > 1:
            self.curve.append((step, float(finite.mean()), float(finite.std())))
        self.features, self.latest, self.latest_step = features, losses, step

    @property
    def unknown_to_the_model(self) -> Tensor:
        """``[M]`` the latest losses; NaN of controls that the model was trained on."""
        return torch.where(self.trained, torch.nan, self.latest)

    def pass_by(self, step: int) -> None:
        """An evaluation at ``step`` without any held-out sample: the controls are first visits then."""
        self.previous_step, self.latest_step = max(0, self.latest_step), step

    def weight_at(self, steps: Tensor) -> Tensor:
        """``[N]`` in 0…1: where visits at ``steps`` ``[N]`` lie between the last two evaluations, in log(step).

        Losses fall about linearly there; a straight line in the step itself would lie above the curve and show a
        gap where there is none.
        """
        return _between(torch.tensor([self.previous_step, self.latest_step]), torch.tensor([0.0, 1.0]), steps).float()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_FACTS, "trained")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _FACTS:
            setattr(self, name, state[name])
        self.trained = state.get("trained", torch.zeros(len(self.ids), dtype=torch.bool))  # older versions knew of none
        self.curve = [(int(step), mean, spread) for step, mean, spread in state["curve"]]


_FACTS = ("ids", "features", "previous", "latest", "previous_step", "latest_step", "curve")


def _of_windows(ids: Tensor, losses: Tensor, elements: Tensor) -> Tensor:
    """``[M]``: for each window the mean over the elements of all windows of its id that have a finite loss."""
    _, which = ids.unique(return_inverse=True)
    known = torch.isfinite(losses)
    weights = torch.where(known, elements.float(), 0.0)
    sums = torch.zeros(len(ids)).index_add(0, which, torch.where(known, losses, 0.0) * weights)
    return (sums / torch.zeros(len(ids)).index_add(0, which, weights))[which]


def _between(at: Tensor, values: Tensor, steps: Tensor) -> Tensor:
    """``values`` known at steps ``at`` ``[E]``, read at any ``steps``: linear in the logarithm, flat outside."""
    if len(at) == 1 or at[0] == at[-1]:
        return values[-1].double().expand(steps.shape)
    knots, where = at.double().clamp(min=1).log(), steps.double().clamp(min=1).log()
    right = torch.searchsorted(knots, where).clamp(1, len(knots) - 1)
    weight = (where - knots[right - 1]) / (knots[right] - knots[right - 1]).clamp(min=1e-9)
    return torch.lerp(values[right - 1].double(), values[right].double(), weight.clamp(0, 1))
