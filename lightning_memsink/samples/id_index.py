"""An index from 64-bit ids to dense rows.

N  ids known      V  ids looked up
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.samples.unique import first_of_each


class IdIndex:
    """From any 64-bit id to a dense row, rows in order of first occurrence.

    Sorted runs, each at least twice as long as the next: new ids are a run, merged with the last ones while they are
    short. So a new id is moved a few dozen times in all, and a lookup is a binary search in each run; 12 bytes a row.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[Tensor, Tensor]] = []  # ids int64, ascending, and their rows int32

    @staticmethod
    def of(ids: Tensor) -> IdIndex:
        """The index of ``ids`` ``[N]``, all different, in rows 0…N-1."""
        index = IdIndex()
        if len(ids):
            ordered, rows = ids.sort()
            index._runs = [(ordered, rows.int())]
        return index

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(ids.nbytes + rows.nbytes for ids, rows in self._runs)

    def find(self, ids: Tensor) -> Tensor:
        """Rows ``[V]`` int64 of ``ids`` ``[V]``; -1 for an unknown id."""
        if not self._runs:
            return torch.full(ids.shape, -1, dtype=torch.int64)
        rows = _rows_in(*self._runs[0], ids)  # which is most of them
        for run in self._runs[1:]:
            missing = (rows < 0).nonzero().flatten()
            if not len(missing):
                break
            rows[missing] = _rows_in(*run, ids[missing])
        return rows

    def intern(self, ids: Tensor) -> Tensor:
        """Rows of ``ids``, giving new ids the next rows in order of first occurrence."""
        rows = self.find(ids)
        unknown = (rows < 0).nonzero().flatten()
        if len(unknown):
            new, first = first_of_each(ids[unknown])
            new_rows = torch.empty_like(first)
            new_rows[first.argsort()] = len(self) + torch.arange(len(new))
            rows[unknown] = new_rows[torch.searchsorted(new, ids[unknown])]
            self._append(new, new_rows.int())
        return rows

    def ids(self) -> Tensor:
        """``[N]`` int64: the id of each row."""
        by_row = torch.empty(len(self), dtype=torch.int64)
        for known, at in self._runs:
            by_row[at.long()] = known
        return by_row

    def _append(self, ids: Tensor, rows: Tensor) -> None:
        while self._runs and len(self._runs[-1][0]) < 2 * len(ids):
            ids, rows = _merge(*self._runs.pop(), ids, rows)
        self._runs.append((ids, rows))


def _rows_in(known: Tensor, at: Tensor, ids: Tensor) -> Tensor:
    """Rows ``[V]`` int64 of ``ids`` ``[V]`` in one sorted run; -1 for those that are not in it."""
    place = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
    return torch.where(known[place] == ids, at[place], -1).long()


def _merge(ids: Tensor, rows: Tensor, more_ids: Tensor, more_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two sorted runs without a common id as one."""
    place = torch.searchsorted(ids, more_ids) + torch.arange(len(more_ids))
    before = torch.ones(len(ids) + len(more_ids), dtype=torch.bool)
    before[place] = False
    merged = []
    for old, new in ((ids, more_ids), (rows, more_rows)):
        both = torch.empty(len(before), dtype=old.dtype)
        both[place], both[before] = new, old
        merged.append(both)
    return merged[0], merged[1]
