"""Sample ids that travel with the batches of a `torch.utils.data.DataLoader`.

The ids are attached where samples are fetched (in the worker, if there are workers) and removed in the main process
before the batch is used. Nothing is read from the sampler, whose order is not the order in which batches arrive.
"""

from __future__ import annotations

import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_memsink.samples.batch import tensors_in
from lightning_memsink.samples.hashing import key_ids


class TaggedBatch(NamedTuple):
    """A batch with the ids of its samples, as a tagged loader's worker sends it.

    It is a named tuple because torch pins the memory of tensors inside one. ``ids`` are int64s as bytes: a tensor would
    cost each batch a file in shared memory.
    """

    ids: bytes
    batch: Any


Listener = Callable[[object, Tensor | None], None]
"""Called with each batch's iterator and the ids ``[B]`` fetched for it; None if no ids were."""


def is_taggable(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether a loader fetches samples by key and collates them: torch's loader, map-style data, automatic batching."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def tag_loader(loader: DataLoader[Any], listener: Listener) -> DataLoader[Any]:
    """A view of a taggable loader that yields the same batches and calls ``listener`` with the ids of each.

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


class _Proxy:
    """A proxy of an object: it reads and writes the object's attributes, and `isinstance` sees the object's class."""

    __slots__ = ("__weakref__", "_memsink_inner")

    def __init__(self, inner: Any) -> None:
        object.__setattr__(self, "_memsink_inner", inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memsink_inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._memsink_inner, name, value)

    def __len__(self) -> int:
        return len(self._memsink_inner)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._memsink_inner,)

    __class__ = property(lambda self: type(self._memsink_inner))


class _Fetched(NamedTuple):
    ids: bytes
    samples: Any


class _IdDataset(_Proxy):
    """A data set that returns samples together with their ids. It fetches as torch's own fetcher does."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return self._memsink_inner[key]

    def __getitems__(self, keys: Iterable[Any]) -> _Fetched:
        dataset = self._memsink_inner
        get_items = getattr(dataset, "__getitems__", None)
        samples = get_items(keys) if get_items else [dataset[key] for key in keys]
        ids = key_ids(keys) if isinstance(keys, Iterable) else array("q")
        if min(ids, default=0) < 0 and isinstance(dataset, Sized):  # a negative index counts from the end
            ids = array("q", [number + len(dataset) if -len(dataset) <= number < 0 else number for number in ids])
        return _Fetched(ids.tobytes(), samples)


class _Collate:
    """The user's collate_fn, which gets the samples without their ids; the ids are added to its result."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: _Fetched) -> TaggedBatch:
        return TaggedBatch(fetched.ids, self.collate(fetched.samples))


class _PendingIds:
    """Ids removed from batches that the loader's own ``__iter__`` has not yielded yet.

    With torch's ``__iter__`` there is at most one. A subclass may prefetch or skip batches: then a batch is recognized
    by its first tensor. If that tensor was replaced, the batch is taken for the oldest.
    """

    def __init__(self) -> None:
        self.entries: deque[tuple[weakref.ref[Tensor] | None, Tensor]] = deque()

    def put(self, tagged: TaggedBatch) -> None:
        first = next(tensors_in(tagged.batch), None)
        raw = bytearray(tagged.ids)
        ids = torch.frombuffer(raw, dtype=torch.int64) if raw else torch.empty(0, dtype=torch.int64)
        self.entries.append((None if first is None else weakref.ref(first), ids))

    def claim(self, batch: Any) -> Tensor | None:
        first = next(tensors_in(batch), None)
        matches = [
            i for i, (tensor, _) in enumerate(self.entries) if tensor and first is not None and tensor() is first
        ]
        for _ in range(matches[0] if matches else 0):
            self.entries.popleft()
        return self.entries.popleft()[1] if self.entries else None


class _UntaggingIterator(_Proxy):
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
        ids = self._memsink_pending.claim(batch)
        if batch is not None:
            self._memsink_listener(self, ids)
        return batch


class _View(DataLoader[Any]):
    """A base that `_view_class` adds to the user's class. Its slots hide the attributes that a view doesn't share."""

    __slots__ = ("_iterator", "_memsink_listener", "_memsink_loader", "_memsink_pending")
    _memsink_listener: Listener
    _memsink_loader: DataLoader[Any]
    _memsink_pending: _PendingIds

    @classmethod
    def of(cls, loader: DataLoader[Any], listener: Listener) -> _View:
        view = cls.__new__(cls)
        view.__dict__ = loader.__dict__
        view._iterator, view._memsink_loader = None, loader
        view._memsink_listener, view._memsink_pending = listener, _PendingIds()
        return view

    def __iter__(self) -> Any:
        self._memsink_pending.entries.clear()
        return _ViewIterator(super().__iter__(), self._memsink_pending, self._memsink_listener)

    def _get_iterator(self) -> Any:
        dataset, collate = self.dataset, self.collate_fn
        # torch reads both attributes once, here; DataLoader.__setattr__ would refuse a new dataset
        vars(self).update(dataset=_IdDataset(dataset), collate_fn=_Collate(collate))
        try:
            return _UntaggingIterator(super()._get_iterator(), self._memsink_pending)
        finally:
            vars(self).update(dataset=dataset, collate_fn=collate)


def _view_class(loader_class: type[DataLoader[Any]]) -> type[_View]:
    names = {"__slots__": (), "__module__": loader_class.__module__, "__qualname__": loader_class.__qualname__}
    return type(loader_class.__name__, (_View, loader_class), names)
