"""Families of near-duplicate texts, found in a thread of its own while the model trains.

A family's texts differ in some of their tokens: where 10 % of them were changed nearly all texts are found, at 20 %
two thirds. A shingle that very many texts share counts for little (`samples.shingles.TextCounts`), so neither a header
before each text nor the fixed words of a template make a family. Texts that are nearly equal are one, however many
there are; but of more than about fifty texts that differ in 10 % of their tokens, only some are found, for the same
reason.

N  rows of the table      V  texts that come      T  tokens
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_memsink._distributed import is_first
from lightning_memsink.samples.near_duplicates import NearDuplicates
from lightning_memsink.samples.shingles import hashes_of, shingle_length
from lightning_memsink.samples.tokens import Tokens

LIMIT = 1 << 20
"""Texts compared by default: about 330 MB."""
WAITING = 64
"""Batches of texts that wait for the thread at most."""
TOKENS_AT_A_TIME = 1 << 19

_Batch = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


class Families:
    """Finds the family of each text. A text is compared with all before it, once: the first time it comes.

    Takes 240 to 320 bytes a text and 32 MiB, and 11 to 15 microseconds a text of 64 tokens, on one thread of its own,
    which lives as long as texts wait for it. It draws no random numbers. Where several processes add the same texts in
    the same order, all find the same families.

    Args:
        limit: texts to compare at most; later ones get no family, which is said once.
    """

    _waiting: deque[_Batch]
    _thread: threading.Thread | None
    _changed: threading.Condition
    _busy: threading.Lock

    def __init__(self, limit: int = LIMIT) -> None:
        if limit < 1:
            raise ValueError(f"limit is a number of texts, at least 1, but it is {limit}.")
        self.limit = limit
        self._index = NearDuplicates()
        self._length: int | None = None
        self._rows: list[NDArray[np.int64]] = []
        self._added = np.zeros(0, dtype=bool)
        self._count = 0
        self._found: Tensor | None = None
        self._failed: str | None = None
        self._limit_said = self._failure_said = False
        self._begin()

    def __len__(self) -> int:
        """Texts added so far, those that wait included."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of memory, less 32 MiB that every one takes."""
        return self._index.nbytes + self._added.nbytes + sum(rows.nbytes for rows in self._rows)

    def add(self, rows: Tensor, tokens: Tokens) -> Tensor:
        """Adds texts; those that were added before are passed over. Returns, before they are compared, which are new.

        If 64 batches wait already, it waits for the thread, so that memory stays bounded.

        Args:
            rows: ``[V]`` of the table, not negative; of a row that comes twice the first text counts.
            tokens: of each row, ``[V, T]`` on the CPU. Nobody may change them afterwards.

        Returns:
            Bool ``[V]``: which rows were added now.

        Raises:
            ValueError: there is not one text for each row, or a row is negative.
        """
        if len(rows) != len(tokens.ids) or tokens.mask.shape != tokens.ids.shape:
            raise ValueError(f"{len(rows)} rows come with texts {list(tokens.ids.shape)}, not one for each.")
        self._warn()
        numbers, new = rows.detach().long().numpy(), torch.zeros(len(rows), dtype=torch.bool)
        if self._failed is not None or not len(numbers):
            return new
        if int(numbers.min()) < 0:
            raise ValueError(f"A row of a table is not negative, but one is {int(numbers.min())}.")
        at = self._not_added(numbers)
        new[at] = True
        if not len(at):
            return new
        ids, mask = (tensor.detach().numpy()[at] for tensor in (tokens.ids.long(), tokens.mask != 0))
        if self._length is None:
            self._length = shingle_length(ids, mask)
            self._index = NearDuplicates(self._length)
        self._added[numbers[at]] = True
        self._count += len(at)
        with self._changed:
            while len(self._waiting) >= WAITING:
                self._changed.wait()
            self._waiting.append((numbers[at], ids, mask))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="memsink-families", daemon=True)
                self._thread.start()
        return new

    def settled(self) -> None:
        """Returns when every text that was added has been compared. Warns, once, if the thread has failed."""
        with self._changed:
            while self._waiting and self._thread is not None:
                self._changed.wait()
        while self._waiting:  # of a copy, or of a process that was forked while texts waited
            self._take_one()
        self._warn()

    def numbers(self, rows: int) -> Tensor:
        """``[rows]`` int32: the lowest row of each text's family; a text without one has its own row."""
        self.settled()
        if self._found is None or len(self._found) < rows:
            self._found = self._of_rows(max(rows, len(self._added)))
        return self._found[:rows].clone()

    def state_dict(self) -> dict[str, Any]:
        self.settled()
        rows = self._compared()
        return {"rows": torch.from_numpy(rows), "length": self._length, **self._index.state_dict(len(rows))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what was saved. An empty state, of a ledger without families, begins anew: each text is added when
        it comes the next time."""
        self.settled()
        index, rows = NearDuplicates(), np.zeros(0, dtype=np.int64)
        if state.get("length") is not None:
            index = NearDuplicates(state["length"])
            index.load_state_dict(state)
            rows = state["rows"].numpy().copy()
        self._index, self._rows, self._count = index, [rows], len(rows)
        self._length = state.get("length")
        self._added = np.zeros(int(rows.max()) + 1 if len(rows) else 0, dtype=bool)
        self._added[rows] = True
        self._found = self._failed = None
        self._limit_said = self._failure_said = False

    def __getstate__(self) -> dict[str, Any]:
        self.settled()
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def _begin(self) -> None:
        """What belongs to this process, and to no copy."""
        self._waiting = deque()
        self._thread = None
        self._changed = threading.Condition()
        self._busy = threading.Lock()
        _ALL.add(self)

    def _not_added(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the first of each row that was not added before, as many as the limit allows."""
        if int(rows.max()) >= len(self._added):
            wider = np.zeros(max(int(rows.max()) + 1, len(self._added) * 3 // 2), dtype=bool)
            wider[: len(self._added)] = self._added
            self._added = wider
        distinct, first = np.unique(rows, return_index=True)
        at: NDArray[np.int64] = np.sort(first[~self._added[distinct]])
        if len(at) > self.limit - self._count:
            at = at[: self.limit - self._count]
            if not self._limit_said and is_first():
                warnings.warn(
                    f"memsink compares {self.limit:,} texts to find families of near-duplicates, and there are more: "
                    "the others get no family. Families(limit=...) takes more, at about 320 bytes each.",
                    stacklevel=3,
                )
            self._limit_said = True
        return at

    def _work(self) -> None:
        while True:
            self._take_one()
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return

    def _take_one(self) -> None:
        """Compares the batch that waits longest, and takes it off."""
        with self._busy:
            if self._failed is None:
                try:
                    self._compare(*self._waiting[0])
                except Exception as error:
                    self._failed = f"{type(error).__name__}: {error}"
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _compare(self, rows: NDArray[np.int64], ids: NDArray[np.int64], mask: NDArray[np.bool_]) -> None:
        assert self._length is not None
        self._found = None
        texts = max(1, TOKENS_AT_A_TIME // max(1, ids.shape[1]))
        for start in range(0, len(rows), texts):
            part = slice(start, start + texts)
            width = int(np.flatnonzero(mask[part].any(axis=0)).max(initial=-1)) + 1
            self._index.add(hashes_of(ids[part, :width], mask[part, :width], self._length))
            self._rows.append(rows[part])
        if len(self._rows) > 256:
            self._rows = [np.concatenate(self._rows)]

    def _of_rows(self, rows: int) -> Tensor:
        found, own = np.arange(rows, dtype=np.int32), self._compared()
        groups = self._index.groups()[: len(own)]
        lowest = own.copy()
        np.minimum.at(lowest, groups, own)
        found[own] = lowest[groups]
        return torch.from_numpy(found)

    def _compared(self) -> NDArray[np.int64]:
        """Rows of the texts in the index, in its order; the last ones of a batch that failed may not be there."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._rows])[: len(self._index)]

    def _warn(self) -> None:
        if self._failed is None or self._failure_said:
            return
        self._failure_said = True
        if is_first():
            warnings.warn(
                f"memsink stopped looking for near-duplicates after {len(self._index):,} texts, and keeps the families "
                f"found up to then: {self._failed}",
                stacklevel=3,
            )


_OF_THE_PROCESS = ("_waiting", "_thread", "_changed", "_busy")
_ALL: weakref.WeakSet[Families] = weakref.WeakSet()
_HELD: list[Families] = []


def _before_fork() -> None:
    """Waits for the batch that is compared now: a child process copies no half of it."""
    for families in list(_ALL):
        families._busy.acquire()
        families._changed.acquire()
        _HELD.append(families)


def _in_parent() -> None:
    while _HELD:
        families = _HELD.pop()
        families._changed.release()
        families._busy.release()


def _in_child() -> None:
    """The thread is not copied, and locks are as they were: what waits is compared when it is read."""
    while _HELD:
        families = _HELD.pop()
        waiting = families._waiting
        families._begin()
        families._waiting = waiting


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
