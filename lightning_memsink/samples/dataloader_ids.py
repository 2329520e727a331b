"""Sample ids that travel with the batches of a `torch.utils.data.DataLoader`.

The ids are attached where samples are fetched (in the worker, if there are workers; `samples.tagged_batch`) and removed
in the main process before the batch is used.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_memsink.samples.batch import tensors_in
from lightning_memsink.samples.collate_layout import CollateLayout
from lightning_memsink.samples.tagged_batch import (
    Fetched,
    KeyedBatches,
    KeyedDataset,
    Proxy,
    TaggedBatch,
    TaggingCollate,
)

Listener = Callable[[object, Any, Fetched | None], None]
"""Called with each batch's iterator, the batch, and what is known of its samples; None if nothing is."""


def is_taggable(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether samples can be followed from the data set into the loader's batches: torch's loader, unless it is a
    stream that makes its own batches."""
    return isinstance(loader, DataLoader) and (loader.batch_sampler is not None or fetches_by_key(loader))


def fetches_by_key(loader: object) -> bool:
    """Whether a loader fetches samples by key, so that they have row numbers: torch's loader over map-style data."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def tag_loader(loader: DataLoader[Any], listener: Listener) -> DataLoader[Any]:
    """A view of a taggable loader that yields the same batches and calls ``listener`` with the samples of each.

    It is an instance of the user's class. It shares all attributes with the user's loader, in both directions, except
    the live iterator: the view leaves no trace in the user's loader.
    """
    return _view_class(type(loader)).of(loader, listener)


def untag_loader(loader: Any) -> Any:
    """The user's loader behind a view. The view's persistent workers end. Anything else is returned unchanged."""
    if not isinstance(loader, _View):
        return loader
    loader._iterator = None
    return loader._memsink_loader


class _PendingIds:
    """Ids removed from batches that the loader's own ``__iter__`` has not yielded yet.

    With torch's ``__iter__`` there is at most one. A subclass may prefetch or skip batches: then a batch is recognized
    by its first tensor. If that tensor was replaced, the batch is taken for the oldest.
    """

    def __init__(self) -> None:
        self.entries: deque[tuple[weakref.ref[Tensor] | None, Fetched]] = deque()

    def put(self, tagged: TaggedBatch) -> None:
        first = next(tensors_in(tagged.batch), None)
        self.entries.append((None if first is None else weakref.ref(first), Fetched.of(tagged)))

    def claim(self, batch: Any) -> Fetched | None:
        first = next(tensors_in(batch), None)
        matches = [
            i for i, (tensor, _) in enumerate(self.entries) if tensor and first is not None and tensor() is first
        ]
        for _ in range(matches[0] if matches else 0):
            self.entries.popleft()
        return self.entries.popleft()[1] if self.entries else None


class _UntaggingIterator(Proxy):
    """torch's own iterator, which removes the ids from each batch and keeps them in ``pending``."""

    __slots__ = ("_memsink_pending",)

    def __init__(self, batches: Iterator[Any], pending: _PendingIds) -> None:
        super().__init__(batches)
        object.__setattr__(self, "_memsink_pending", pending)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        tagged = next(self._memsink_inner)
        if type(tagged) is not TaggedBatch:
            return tagged
        self._memsink_pending.put(tagged)
        return tagged.batch


class _ViewIterator(_UntaggingIterator):
    """One pass over a view. It reports no batch that is None, which Lightning skips."""

    __slots__ = ("_memsink_listener",)

    def __init__(self, batches: Iterator[Any], pending: _PendingIds, listener: Listener) -> None:
        super().__init__(batches, pending)
        object.__setattr__(self, "_memsink_listener", listener)

    def __next__(self) -> Any:
        batch = next(self._memsink_inner)
        fetched = self._memsink_pending.claim(batch)
        if batch is not None:
            self._memsink_listener(self, batch, fetched)
        return batch


class _View(DataLoader[Any]):
    """A base that `_view_class` adds to the user's class. Its slots hide the attributes that a view doesn't share."""

    __slots__ = ("_iterator", "_memsink_layout", "_memsink_listener", "_memsink_loader", "_memsink_pending")
    _memsink_layout: CollateLayout
    _memsink_listener: Listener
    _memsink_loader: DataLoader[Any]
    _memsink_pending: _PendingIds

    @classmethod
    def of(cls, loader: DataLoader[Any], listener: Listener) -> _View:
        view = cls.__new__(cls)
        view.__dict__ = loader.__dict__
        view._iterator, view._memsink_loader = None, loader
        view._memsink_listener, view._memsink_pending = listener, _PendingIds()
        view._memsink_layout = CollateLayout(loader.collate_fn)
        return view

    def __iter__(self) -> Any:
        self._memsink_pending.entries.clear()
        return _ViewIterator(super().__iter__(), self._memsink_pending, self._memsink_listener)

    def _get_iterator(self) -> Any:
        dataset, collate = self.dataset, self.collate_fn
        if self._memsink_layout.collate is not collate:
            self._memsink_layout = CollateLayout(collate)
        is_batched = self.batch_sampler is not None
        keyed = (KeyedDataset if is_batched else KeyedBatches)(dataset) if fetches_by_key(self) else dataset
        # torch reads both attributes once, here; DataLoader.__setattr__ would refuse a new dataset
        vars(self).update(dataset=keyed, collate_fn=TaggingCollate(collate, self._memsink_layout, is_batched))
        try:
            return _UntaggingIterator(super()._get_iterator(), self._memsink_pending)
        finally:
            vars(self).update(dataset=dataset, collate_fn=collate)


def _view_class(loader_class: type[DataLoader[Any]]) -> type[_View]:
    names = {"__slots__": (), "__module__": loader_class.__module__, "__qualname__": loader_class.__qualname__}
    return type(loader_class.__name__, (_View, loader_class), names)
