"""Which controls have the input of a training sample, so that the model does not meet them for the first time.

M  controls      n  samples of a batch
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_memsink._distributed import gather
from lightning_memsink.samples.input_prints import NO_PRINT

MOST = 1 << 20
"""Training inputs that are remembered, 8 bytes each."""
PENDING, MOST_PENDING = 1024, 1 << 16
"""Inputs that are compared together: a quarter of those that are remembered, within these limits."""
EVERY = 16
"""Of the batches whose inputs came before, the one that is still compared."""
NEW = 0.01
"""Share of inputs that did not come before, up to which they count as those that did."""


class ControlPrints(NamedTuple):
    """``ids`` and ``prints`` ``[M]`` int64 of controls: their hashes, as `input_prints` makes them."""

    ids: Tensor
    prints: Tensor


class ControlOverlap:
    """Compares the inputs of controls with those of training samples, by their hashes.

    The first ``most`` training inputs are remembered, so that controls can come later. Of more, those are found that
    come after the controls: in the rest of the epoch, and in the next one.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._restart({})

    def _restart(self, state: dict[str, Any]) -> None:
        self._trained = state.get("trained", _none()).clone()  # sorted
        self._found = state.get("found", _none()).clone()  # hashes of controls that training samples have, sorted
        self._controls = ControlPrints(state.get("ids", _none()).clone(), state.get("prints", _none()).clone())
        self._pending: list[Tensor] = []
        self._count = 0  # of hashes in _pending
        self._enough = _enough(self._trained)
        self._new_controls: list[ControlPrints] = []
        self._unshared = ControlPrints(_none(), _none())  # that other processes don't have
        self._batches = 0
        self._rows = np.zeros(0, dtype=bool)  # whether the input of a row of the data set was noted
        self._is_known = False  # whether the latest training inputs came before

    def wants_training(self, rows: Tensor | None = None) -> bool:
        """Whether the next training batch is to be compared: each, until the same inputs come again; then a few.

        ``rows``: ``[n]`` of the data set, where they are known: the same rows have the same inputs.
        """
        self._batches += 1
        came_before = rows is not None and self._came_before(rows)
        return self._batches % EVERY == 0 or not (self._is_known or came_before)

    def forget_rows(self) -> None:
        """The rows of another data set may follow."""
        self._rows = np.zeros(0, dtype=bool)

    def _came_before(self, rows: Tensor) -> bool:
        """Whether all of these rows came before; notes them."""
        if not len(rows):
            return False
        places = rows.numpy()  # in every step: torch takes five times as long for as few numbers
        high = int(np.maximum.reduce(places.view(np.uint64)))  # of a negative row more than any number of rows
        if high >= self.most:
            return False
        if high >= len(self._rows):
            longer = np.zeros(min(self.most, max(2 * len(self._rows), high + 1)), dtype=bool)
            longer[: len(self._rows)] = self._rows
            self._rows = longer
        came_before = bool(self._rows[places].all())
        if not came_before:
            self._rows[places] = True
        return came_before

    def note_training(self, prints: Tensor) -> None:
        """Notes hashes ``[n]`` of the inputs of samples that are trained on."""
        self._pending.append(prints)
        self._count += len(prints)
        if self._count >= self._enough:
            self._remember()

    def note_controls(self, ids: Tensor, prints: Tensor) -> None:
        """Notes hashes ``[n]`` of the inputs of controls ``ids`` ``[n]``; one that came before has that of now."""
        if len(ids) != len(prints):
            return
        self._new_controls.append(ControlPrints(ids.clone(), prints))
        if len(self._new_controls) >= PENDING:
            self._add_controls()

    def overlap(self, ids: Tensor) -> Tensor:
        """Bool ``[M]``: of controls ``ids``, those with the input of a training sample; False where it isn't known."""
        self._add_controls()
        self._remember()
        controls = self._controls
        if not len(controls.ids) or not len(ids):
            return torch.zeros(len(ids), dtype=torch.bool)
        place = torch.searchsorted(controls.ids, ids.contiguous()).clamp(max=len(controls.ids) - 1)
        return (controls.ids[place] == ids) & torch.isin(controls.prints[place], self._found)

    def exchange(self) -> None:
        """Shares what each process knows. All must call it at the same point, before `overlap`."""
        self._add_controls()
        self._new_controls = gather(self._unshared)
        self._add_controls()
        self._unshared = ControlPrints(_none(), _none())
        self._remember()
        self._found = torch.cat(gather(self._found)).unique()

    def state_dict(self) -> dict[str, Any]:
        self._remember()
        self._add_controls()
        ids, prints = self._controls
        return {"trained": self._trained, "ids": ids, "prints": prints, "found": self._found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; from one of an older version, which is empty, as at the start of a run."""
        self._restart(state)

    def _remember(self) -> None:
        """Remembers the pending training inputs, and compares them with the controls that are known."""
        if not self._pending:
            return
        are_many = self._count >= self._enough
        prints = _ranked_(torch.cat(self._pending))
        self._pending, self._count = [], 0
        self._find(prints)
        room = self.most - len(self._trained)
        if room <= 0:
            self._is_known = False
            return
        new = prints[~_is_in(prints, self._trained) & (prints != NO_PRINT)]
        self._is_known = len(new) <= NEW * len(prints) and (are_many or self._is_known)
        if len(new):
            both = np.concatenate([self._trained.numpy(), new[:room].numpy()])
            both.sort(kind="stable")  # which merges what is sorted already
            self._trained = torch.from_numpy(both)
            self._enough = _enough(self._trained)

    def _add_controls(self) -> None:
        """Compares the controls that were noted since the last call."""
        if not self._new_controls:
            return
        ids = torch.cat([new.ids for new in self._new_controls])
        prints = torch.cat([new.prints for new in self._new_controls])
        self._new_controls = []
        is_changed = ~self._has(ids, prints)
        if not bool(is_changed.any()):
            return
        new = ControlPrints(ids[is_changed], prints[is_changed])
        self._unshared = _joined(self._unshared, new)
        self._controls = _joined(self._controls, new)
        self._find(self._trained)
        self._is_known = False

    def _has(self, ids: Tensor, prints: Tensor) -> Tensor:
        known = self._controls
        if not len(known.ids):
            return torch.zeros(len(ids), dtype=torch.bool)
        place = torch.searchsorted(known.ids, ids).clamp(max=len(known.ids) - 1)
        return (known.ids[place] == ids) & (known.prints[place] == prints)

    def _find(self, trained: Tensor) -> None:
        """Adds the controls whose inputs are among ``trained``, sorted hashes."""
        of_controls = self._controls.prints
        found = of_controls[_is_in(of_controls, trained) & (of_controls != NO_PRINT)]
        if len(found):
            self._found = torch.cat([self._found, found]).unique()


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


def _enough(trained: Tensor) -> int:
    """How many pending inputs are compared together."""
    return min(max(PENDING, len(trained) // 4), MOST_PENDING)


def _ranked_(prints: Tensor) -> Tensor:
    """Sorts the hashes in place; returns each of them once."""
    ranked = prints.numpy()
    ranked.sort()
    is_first = np.ones(len(ranked), dtype=bool)
    is_first[1:] = ranked[1:] != ranked[:-1]
    return torch.from_numpy(ranked[is_first])


def _is_in(values: Tensor, ranked: Tensor) -> Tensor:
    """Bool, as ``values``: those that are among ``ranked``, which are sorted."""
    if not len(ranked):
        return torch.zeros(len(values), dtype=torch.bool)
    # numpy goes through sorted values in a sixth of torch's time
    place = np.searchsorted(ranked.numpy(), values.numpy()).clip(max=len(ranked) - 1)
    return torch.from_numpy(ranked.numpy()[place] == values.numpy())


def _joined(first: ControlPrints, second: ControlPrints) -> ControlPrints:
    """Each id once, with its last hash, in the order of ids."""
    ids, prints = (torch.cat(pair).flip(0) for pair in zip(first, second, strict=True))
    order = ids.argsort(stable=True)
    ranked = ids[order]
    is_first = torch.ones(len(ranked), dtype=torch.bool)
    is_first[1:] = ranked[1:] != ranked[:-1]
    return ControlPrints(ranked[is_first], prints[order][is_first])
