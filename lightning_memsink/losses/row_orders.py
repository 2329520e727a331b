"""Remembers in which order the rows of a loss call are, so that steps like one that was watched need not be watched.

B  samples in a batch      N  elements of a call
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from lightning_memsink.losses.sample_rows import Runs, SampleAxisLost, SampleRows


@dataclass
class _Orders:
    """Of one call: the order seen for each (B, N)."""

    seen: dict[tuple[int, int], Runs] = field(default_factory=dict)

    def learn(self, batch_size: int, elements: int, runs: Runs) -> bool:
        """False if the same sizes came in another order before."""
        return self.seen.setdefault((batch_size, elements), runs) == runs

    def of(self, batch_size: int, elements: int) -> Runs | None:
        """The order for these sizes; for new sizes only if all that was seen allows but one."""
        known = self.seen.get((batch_size, elements))
        if known is not None or not batch_size:
            return known
        guesses = {guess for guess in self._guesses(batch_size, elements) if guess is not None}
        return guesses.pop() if len(guesses) == 1 else None

    @property
    def is_general(self) -> bool:
        """Whether either the repeats or the length of runs is known not to vary."""
        repeats, lengths = {each.repeats for each in self.seen.values()}, {each.length for each in self.seen.values()}
        return self._are_whole and (len(repeats) == 1) != (len(lengths) == 1)

    @property
    def _are_whole(self) -> bool:
        return all(runs.first == 0 and runs.count == size for (size, _), runs in self.seen.items())

    def _guesses(self, batch_size: int, elements: int) -> list[Runs | None]:
        if not self._are_whole or elements % batch_size:
            return []
        repeats, lengths = {each.repeats for each in self.seen.values()}, {each.length for each in self.seen.values()}
        each = elements // batch_size
        guesses: list[Runs | None] = []
        if len(repeats) == 1 and each % (k := next(iter(repeats))) == 0:
            guesses.append(Runs(k, 0, batch_size, each // k))
        if len(lengths) == 1 and each % (r := next(iter(lengths))) == 0:
            guesses.append(Runs(each // r, 0, batch_size, r))
        return guesses


class RowOrders:
    """The orders of the calls of each kind of step, by a key of the kind."""

    def __init__(self) -> None:
        self.has_conflict = False
        """Whether steps of one kind had their rows in different orders: then each has to be watched."""
        self._known: dict[Hashable, list[_Orders] | str] = {}

    @property
    def are_general(self) -> bool:
        """Whether the orders are known for batches of any shape."""
        return all(
            isinstance(orders, str) or all(each.is_general for each in orders) for orders in self._known.values()
        )

    def learn(self, key: Hashable, rows: Sequence[SampleRows | str], shapes: Sequence[torch.Size], size: int) -> bool:
        """Notes the order of the rows of a step's calls. False if they have no regular order."""
        known = self._known.setdefault(key, [_Orders() for _ in rows])
        if isinstance(known, str):
            self.has_conflict = True
            return False
        for orders, own, shape in zip(known, rows, shapes, strict=True):
            runs = None if isinstance(own, str) else Runs.of(own.owners.expand(shape).reshape(-1))
            if runs is None:
                return False
            if not orders.learn(size, shape.numel(), runs):
                self.has_conflict = True
        return True

    def refuse(self, key: Hashable, reason: str) -> None:
        """Notes that the losses of such steps can't be assigned to samples."""
        self.has_conflict |= not isinstance(self._known.setdefault(key, reason), str)

    def of(self, key: Hashable, shapes: Sequence[torch.Size], batch_size: int) -> list[SampleRows]:
        """The rows of a step's calls.

        Raises:
            SampleAxisLost: such steps were refused, or none was watched yet.
        """
        known = self._known.get(key)
        if isinstance(known, str):
            raise SampleAxisLost(known)
        orders = [each.of(batch_size, shape.numel()) for each, shape in zip(known or (), shapes, strict=False)]
        if not known or any(each is None for each in orders):
            raise NotWatched("no step like it was watched before")
        return [_rows(runs, shape) for runs, shape in zip(orders, shapes, strict=True) if runs is not None]


class TargetOrders:
    """For batches whose rows hold several samples: in which kinds of steps the targets alone say whose rows are whose.

    The order is another one in each batch, and is read off its targets.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, bool] = {}

    @property
    def are_known(self) -> bool:
        """Whether no step need be watched."""
        return bool(self._known) and all(self._known.values())

    def learn(self, key: Hashable, do_say: bool) -> None:
        self._known[key] = do_say and self._known.get(key, True)

    def rows(self, key: Hashable, by_target: Sequence[SampleRows | str]) -> list[SampleRows]:
        """The rows of a step's calls, as their targets say them.

        Raises:
            NotWatched: they don't say it of such steps, or not of this one, or none like it was watched yet.
        """
        found = [rows for rows in by_target if isinstance(rows, SampleRows)]
        if not self._known.get(key, False) or len(found) < len(by_target):
            raise NotWatched("its targets do not say which documents its rows are of")
        return found


class NotWatched(SampleAxisLost):
    """The rows of this step would be known if it had been watched."""


@lru_cache(maxsize=256)
def _rows(runs: Runs, shape: torch.Size) -> SampleRows:
    return SampleRows(runs.owners().reshape(shape))
