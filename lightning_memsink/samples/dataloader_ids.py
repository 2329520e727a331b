"""Keys that travel with the samples of a data loader.

The key is attached where a sample is fetched (in the worker, if there are workers) and taken off in the main process
before anybody sees the batch. Nothing is read from the sampler, whose order is not the order of arrival.
"""

from __future__ import annotations

import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from hashlib import blake2b
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_memsink.samples.batch import tensors_in


class Tagged(NamedTuple):
    """What a tagged loader's workers send; a named tuple, for torch pins the memory of what is inside of one.

    ``ids`` are int64s as bytes: as a tensor they would cost every batch a file in shared memory.
    """

    ids: bytes
    batch: Any


Listener = Callable[[object, Tensor | None], None]
"""Told of every batch: the iterator that gave it and the ids ``[B]`` fetched for it; None if none were."""


def is_taggable(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether samples are fetched by key and collated: a torch loader, a map-style data set, automatic batching."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def tagged(loader: DataLoader[Any], listener: Listener) -> DataLoader[Any]:
    """A view of a taggable loader that gives the same batches, and tells ``listener`` whose they are.

    It is an instance of the user's class and shares all attributes with the user's loader, in both directions, but
    the live iterator: the user's loader is as it was when the view is gone.
    """
    return _view_class(type(loader)).of(loader, listener)


def untagged(loader: Any) -> Any:
    """The user's loader behind a view, whose persistent workers end with it; anything else is returned as it is."""
    if not isinstance(loader, _View):
        return loader
    loader._iterator = None
    return loader._memsink_loader


def sample_ids(keys: Iterable[Any]) -> array[int]:
    """Keys as signed 64-bit numbers: an integer is its own, any other key is hashed by its repr."""
    try:
        return array("q", keys)
    except (TypeError, OverflowError):
        return array("q", [_sample_id(key) for key in keys])


def _sample_id(key: Any) -> int:
    try:
        return int(array("q", [key])[0])
    except (TypeError, OverflowError):
        return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little", signed=True)


class _Through:
    """Stands in for an object: attributes are read from it and written to it, and `isinstance` asks its class."""

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


class _Keyed(_Through):
    """A data set whose samples are fetched together with their ids. Fetches as torch's own fetcher does."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return self._memsink_inner[key]

    def __getitems__(self, keys: Iterable[Any]) -> _Fetched:
        rows = self._memsink_inner
        together = getattr(rows, "__getitems__", None)
        samples = together(keys) if together else [rows[key] for key in keys]
        ids = sample_ids(keys) if isinstance(keys, Iterable) else array("q")
        if min(ids, default=0) < 0 and isinstance(rows, Sized):
            ids = array("q", [number + len(rows) if -len(rows) <= number < 0 else number for number in ids])
        return _Fetched(ids.tobytes(), samples)


class _Collate:
    """The user's collate_fn, with the ids carried past it."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: _Fetched) -> Tagged:
        return Tagged(fetched.ids, self.collate(fetched.samples))


class _Pending:
    """Ids taken off batches that the loader's own ``__iter__`` has not handed out yet.

    With torch's ``__iter__`` there is at most one. A subclass may fetch ahead, or leave batches out: the batch is
    then known by its first tensor, and if it was given another, it is the oldest.
    """

    def __init__(self) -> None:
        self.entries: deque[tuple[weakref.ref[Tensor] | None, Tensor]] = deque()

    def put(self, tag: Tagged) -> None:
        first = next(tensors_in(tag.batch), None)
        ids = torch.frombuffer(bytearray(tag.ids), dtype=torch.int64) if tag.ids else torch.empty(0, dtype=torch.int64)
        self.entries.append((None if first is None else weakref.ref(first), ids))

    def claim(self, batch: Any) -> Tensor | None:
        first = next(tensors_in(batch), None)
        known = [i for i, (tensor, _) in enumerate(self.entries) if tensor and first is not None and tensor() is first]
        for _ in range(known[0] if known else 0):
            self.entries.popleft()
        return self.entries.popleft()[1] if self.entries else None


class _Untagging(_Through):
    """torch's own iterator, with the tag taken off each batch."""

    __slots__ = ("_memsink_pending",)

    def __init__(self, batches: Iterator[Any], pending: _Pending) -> None:
        super().__init__(batches)
        object.__setattr__(self, "_memsink_pending", pending)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        tag = next(self._memsink_inner)
        if type(tag) is not Tagged:
            return tag
        self._memsink_pending.put(tag)
        return tag.batch


class _Pass(_Untagging):
    """One pass over a view: what `iter` gives. A batch that is None is no step to Lightning, so none to us."""

    __slots__ = ("_memsink_listener",)

    def __init__(self, batches: Iterator[Any], pending: _Pending, listener: Listener) -> None:
        super().__init__(batches, pending)
        object.__setattr__(self, "_memsink_listener", listener)

    def __next__(self) -> Any:
        batch = next(self._memsink_inner)
        ids = self._memsink_pending.claim(batch)
        if batch is not None:
            self._memsink_listener(self, ids)
        return batch


class Arrived:
    """Ids of the batches a loop has fetched and not started yet, oldest first."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._turn: weakref.ref[Any] | None = None
        self._ids: deque[tuple[int, Tensor | None]] = deque()

    def put(self, turn: object, loader: int, ids: Tensor | None) -> None:
        if self._turn is None or self._turn() is not turn:  # what the last turn fetched too many will not be trained on
            self.clear()
            self._turn = weakref.ref(turn)
        self._ids.append((loader, ids))

    def take(self, loader: int | None = None) -> Tensor | None:
        """The oldest of one loader, or of any."""
        place = next((i for i, (owner, _) in enumerate(self._ids) if loader in (None, owner)), None)
        if place is None:
            return None
        _, ids = self._ids[place]
        del self._ids[place]
        return ids


class _View(DataLoader[Any]):
    """Mixed into the user's class by `_view_class`. Its slots hide the attributes that it doesn't share."""

    __slots__ = ("_iterator", "_memsink_listener", "_memsink_loader", "_memsink_pending")
    _memsink_listener: Listener
    _memsink_loader: DataLoader[Any]
    _memsink_pending: _Pending

    @classmethod
    def of(cls, loader: DataLoader[Any], listener: Listener) -> _View:
        view = cls.__new__(cls)
        view.__dict__ = loader.__dict__
        view._iterator, view._memsink_loader = None, loader
        view._memsink_listener, view._memsink_pending = listener, _Pending()
        return view

    def __iter__(self) -> Any:
        self._memsink_pending.entries.clear()
        return _Pass(super().__iter__(), self._memsink_pending, self._memsink_listener)

    def _get_iterator(self) -> Any:
        rows, collate = self.dataset, self.collate_fn
        # torch reads these two once, here; DataLoader.__setattr__ would forbid the first
        vars(self).update(dataset=_Keyed(rows), collate_fn=_Collate(collate))
        try:
            return _Untagging(super()._get_iterator(), self._memsink_pending)
        finally:
            vars(self).update(dataset=rows, collate_fn=collate)


def _view_class(loader_class: type[DataLoader[Any]]) -> type[_View]:
    names = {"__slots__": (), "__module__": loader_class.__module__, "__qualname__": loader_class.__qualname__}
    return type(loader_class.__name__, (_View, loader_class), names)
