"""The batches that a loop has fetched and not started yet: what is known of their samples."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_memsink.callbacks.runtime.host_batches import EVERY, FIRST, kept
from lightning_memsink.samples.batch import batch_size
from lightning_memsink.samples.id_contents import Contents
from lightning_memsink.samples.input_prints import input_prints
from lightning_memsink.samples.row_order import Order, RowPrints, SameTensors
from lightning_memsink.samples.tagged_batch import Fetched

Inputs: TypeAlias = Literal["all", "named"]
"""Of which samples of a batch the inputs are hashed: of those that their elements name, or of all."""

LOADER_BITS = 48  # a row of loader n has the id (n << 48) + row: loaders stay apart, the first one's ids are its rows


class FetchedBatch(NamedTuple):
    """A batch on its way from the loader to the step."""

    loader: int
    fetched: Fetched
    tensors: SameTensors
    prints: RowPrints | None
    contents: Contents | None
    inputs: Tensor | None = None
    """``[B]`` hashes of the samples' inputs, if they were asked for."""
    host: Any = None
    """As the loader gave it, to be read in the place of the one that the step gets on a device."""


class FetchedBatches:
    """Of one loop, oldest first.

    The batch that a step gets is compared with the one fetched, in a few elements: in the first steps and now and then,
    for on a device it waits; and in all steps once rows were found in another order.
    """

    def __init__(self) -> None:
        self._reorders = False
        self._is_same = True  # so far each step got the very tensors that were fetched
        self._count = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all batches."""
        self._pass: weakref.ref[Any] | None = None
        self._batches: deque[FetchedBatch] = deque()

    def put(
        self,
        combined_pass: object,
        loader: int,
        batch: Any,
        fetched: Fetched | None,
        with_contents: bool,
        inputs: Inputs | None = None,
    ) -> None:
        """Appends a batch of ``loader``. A new pass drops the batches that the last one prefetched."""
        if self._pass is None or self._pass() is not combined_pass:
            self.clear()
            self._pass = weakref.ref(combined_pass)
        fetched = _offset(fetched or Fetched(), loader)
        size = self._size(batch, fetched, with_contents or inputs is not None)
        prints, contents = self._read(batch, fetched, with_contents, size)
        hashed = inputs_of(batch, fetched, size, inputs == "named") if inputs is not None and size else None
        self._batches.append(FetchedBatch(loader, fetched, SameTensors(batch), prints, contents, hashed, kept(batch)))

    def take(self, loader: int | None = None) -> FetchedBatch | None:
        """Removes and returns the oldest batch of one loader, or of any; None if there is none."""
        place = next((n for n, batch in enumerate(self._batches) if loader in (None, batch.loader)), None)
        if place is None:
            return None
        found = self._batches[place]
        del self._batches[place]
        return found

    def order_in(self, batch: Any, taken: FetchedBatch) -> Order:
        """What became of the rows that were fetched, in the batch that the step gets.

        The first batch that holds other tensors, after many that didn't, may have been fetched without anything to
        compare: its order is lost.
        """
        ids, size = taken.fetched.ids, 0 if taken.fetched.ids is None else len(taken.fetched.ids)
        if ids is None or taken.tensors.are_in(batch):
            return Order("kept")
        was_same, self._is_same = self._is_same, False
        if taken.prints is None:
            is_unknown = was_same and self._count > FIRST and size > 1
            self._reorders |= is_unknown
            return Order("lost" if is_unknown else "kept")
        order = taken.prints.order_in(batch, ids)
        self._reorders |= order.kind != "kept"
        return order

    @property
    def _is_due(self) -> bool:
        """Whether rows of this batch are compared."""
        return self._reorders or self._count <= FIRST or self._count % EVERY == 0

    def _size(self, batch: Any, fetched: Fetched, is_asked: bool) -> int | None:
        """B, where anything of the batch is to be read; None if that is unknown."""
        self._count += 1
        if not is_asked and not self._is_due:
            return None
        try:
            return batch_size(batch, fetched.rows if fetched.ids is None else len(fetched.ids), fetched.axes)
        except Exception:  # an odd batch must not end the training: it is not compared
            return None

    def _read(
        self, batch: Any, fetched: Fetched, with_contents: bool, size: int | None
    ) -> tuple[RowPrints | None, Contents | None]:
        if not size:
            return None, None
        try:
            is_due = self._is_due and fetched.ids is not None and len(fetched.ids) == size
            prints = RowPrints.of(batch, size, fetched.axes) if is_due else None
            return prints, Contents.of(batch, size, fetched.axes) if with_contents else None
        except Exception:  # an odd batch must not end the training: it is not compared
            return None, None


def inputs_of(batch: Any, fetched: Fetched, size: int, named_only: bool) -> Tensor | None:
    """``[B]`` hashes of the inputs of a batch as it was fetched, as `input_prints` takes; None if it has none."""
    try:
        return input_prints(batch, size, fetched.axes, named_only)
    except Exception:  # an odd batch must not end the training: it is not compared
        return None


def fetched_parts(combined: Any, batch: Any) -> Iterator[tuple[int, Any]]:
    """The number of each loader of a `CombinedLoader` and its part of ``batch``.

    A part is None where its loader is exhausted.

    Raises:
        ValueError: if a hook of the user's has made one batch of what the loaders gave.
    """
    parts = [batch] if combined._spec.is_leaf() else combined._spec.flatten_up_to(batch)
    return ((n, part) for n, part in enumerate(parts) if part is not None)


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
