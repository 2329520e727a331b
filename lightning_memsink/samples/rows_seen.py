"""From which rows of the data set each sample has come: the first one, and how many there are.

V  visits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.visits import Visits

MOST = torch.iinfo(torch.int16).max


class RowsSeen:
    """Counts rows in the epoch in which a sample first comes: later ones bring the same rows again."""

    def __init__(self) -> None:
        self._epoch = -1
        self._known = 0  # samples in the table before the epoch

    def note(self, table: LossTable, rows: Tensor, visits: Visits, is_new: Tensor) -> None:
        """Writes where the samples of ``visits`` came from, in the ``rows`` ``[V]`` of the table.

        ``is_new`` bool ``[V]``: the sample was not in the table before these visits. Visits are in the order of steps.
        """
        has_row = visits.rows >= 0
        if not bool(has_row.any()):
            return
        for epoch in visits.epochs.unique().tolist():
            some = has_row & (visits.epochs == epoch)
            if epoch != self._epoch:
                before = rows[is_new & (visits.epochs < epoch)]
                self._known = max(self._known_before(table, rows, is_new), int(before.max()) + 1 if len(before) else 0)
                self._epoch = epoch
            self._note(table, rows[some], visits.rows[some])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "known": self._known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._known = state.get("epoch", -1), state.get("known", 0)

    def _known_before(self, table: LossTable, rows: Tensor, is_new: Tensor) -> int:
        return int(rows[is_new].min()) if bool(is_new.any()) else len(table)

    def _note(self, table: LossTable, at: Tensor, data_rows: Tensor) -> None:
        samples, which = at.unique(return_inverse=True)
        visits = torch.arange(len(at))
        first = torch.full_like(samples, len(at)).scatter_reduce(0, which, visits, "amin")
        is_fresh = table.first_row[samples] < 0
        table.write("first_row", samples[is_fresh], data_rows[first[is_fresh]])
        is_another = (at >= self._known) & (data_rows != table.first_row[at])
        others = torch.zeros_like(samples).index_add(0, which, is_another.long())
        table.write("rows", samples, (table.rows[samples] + is_fresh.long() + others).clamp(max=MOST))
