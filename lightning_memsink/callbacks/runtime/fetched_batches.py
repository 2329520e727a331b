"""The batches that a loop has fetched and not started yet: what is known of their samples."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.batch import batch_size
from lightning_memsink.samples.id_contents import Contents
from lightning_memsink.samples.row_order import Order, RowPrints
from lightning_memsink.samples.tagged_batch import Fetched

LOADER_BITS = 48  # a row of loader n has the id (n << 48) + row: loaders stay apart, the first one's ids are its rows
FIRST, EVERY = 8, 64
"""Batches whose rows are compared at the start, and how often later, where comparing waits for a device."""


class FetchedBatch:
    """A batch on its way from the loader to the step."""

    def __init__(self, loader: int, fetched: Fetched | None, prints: RowPrints | None, contents: Contents | None):
        self.loader = loader
        self.fetched = _offset(fetched, loader) if fetched is not None else Fetched()
        self.prints = prints
        self.contents = contents

    def order_in(self, batch: Any) -> Order:
        """What became of the rows that were fetched, in the batch that the step gets."""
        if self.prints is None or self.fetched.ids is None or self.prints.are_same_tensors(batch):
            return Order("kept")
        return self.prints.order_in(batch, self.fetched.ids)


class FetchedBatches:
    """Of one loop, oldest first.

    Of batches in host memory all are compared with those that the step gets, in a few elements. Where the step gets
    them on a device, comparing waits for it: then the first ones are, and one now and then, and all of them once rows
    were found in another order.
    """

    def __init__(self) -> None:
        self.is_on_host = True
        self.reorders = False
        self._count = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all batches."""
        self._pass: weakref.ref[Any] | None = None
        self._batches: deque[FetchedBatch] = deque()

    def put(self, combined_pass: object, loader: int, batch: Any, fetched: Fetched | None, with_contents: bool) -> None:
        """Appends a batch of ``loader``. A new pass drops the batches that the last one prefetched."""
        if self._pass is None or self._pass() is not combined_pass:
            self.clear()
            self._pass = weakref.ref(combined_pass)
        self._batches.append(FetchedBatch(loader, fetched, *self._read(batch, fetched, with_contents)))

    def take(self, loader: int | None = None) -> FetchedBatch | None:
        """Removes and returns the oldest batch of one loader, or of any; None if there is none."""
        found = next((batch for batch in self._batches if loader in (None, batch.loader)), None)
        if found is not None:
            self._batches.remove(found)
        return found

    def _read(
        self, batch: Any, fetched: Fetched | None, with_contents: bool
    ) -> tuple[RowPrints | None, Contents | None]:
        self._count += 1
        is_due = self.is_on_host or self.reorders or self._count <= FIRST or self._count % EVERY == 0
        fetched = fetched or Fetched()
        size = batch_size(batch, fetched.rows if fetched.ids is None else len(fetched.ids), fetched.axes)
        if not size or (size == 1 and not with_contents):
            return None, None
        try:
            is_due = is_due and fetched.ids is not None and len(fetched.ids) == size
            prints = RowPrints.of(batch, size, fetched.axes) if is_due else None
            return prints, Contents.of(batch, size, fetched.axes) if with_contents else None
        except Exception:  # an odd batch must not end the training: it is not compared
            return None, None


def fetched_parts(combined: Any, batch: Any) -> Iterator[tuple[int, Any]]:
    """The number of each loader of a `CombinedLoader` and its part of ``batch``.

    A part is None where its loader is exhausted.

    Raises:
        ValueError: if a hook of the user's has made one batch of what the loaders gave.
    """
    return ((n, part) for n, part in enumerate(combined._spec.flatten_up_to(batch)) if part is not None)


def concatenated(ids: list[Tensor | None]) -> Tensor | None:
    """Ids of several loaders, one after the other; None if any of them has none."""
    if len(ids) == 1:
        return ids[0]
    known = [part for part in ids if part is not None]
    return torch.cat(known) if known and len(known) == len(ids) else None


def _offset(fetched: Fetched, loader: int) -> Fetched:
    if not loader or fetched.ids is None:
        return fetched
    names = None
    if fetched.names:
        old = torch.tensor(list(fetched.names), dtype=torch.int64)
        names = dict(zip((old + (loader << LOADER_BITS)).tolist(), fetched.names.values(), strict=True))
    return fetched._replace(ids=fetched.ids + (loader << LOADER_BITS), names=names)
