"""What a tagged loader's worker sends with each batch, and the data set and collate function that put it there.

Nothing is read from the sampler, whose order is not the order in which batches arrive.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_memsink.samples.collate_layout import CollateLayout
from lightning_memsink.samples.joined_rows import joined_lengths
from lightning_memsink.samples.sample_keys import key_ids, named_keys, refusal_of


class TaggedBatch(NamedTuple):
    """A batch with what is known of its samples, as a tagged loader's worker sends it.

    It is a named tuple because torch pins the memory of tensors inside one. ``ids`` and ``axes`` are numbers as bytes:
    a tensor would cost each batch a file in shared memory.
    """

    ids: bytes | None
    """int64s, one a row; None without keys, as of a stream, and where it isn't known which row is whose."""
    rows: int | None
    """Number of samples fetched; None where the data set made the batch itself."""
    axes: bytes | None
    """int32s, `Layout.axes`."""
    keys: Keys | None
    refusal: str
    """Why there are no ids; empty if that needs no word."""
    batch: Any
    lengths: bytes | None = None
    """int64s, how many tokens each sample has, where they follow one another in a single row of tokens."""


class Keys:
    """Original keys by id, of those that are no 64-bit integers. It is no container, so torch leaves it as it is."""

    __slots__ = ("by_id",)

    def __init__(self, by_id: dict[int, Any]) -> None:
        self.by_id = by_id

    def __reduce__(self) -> tuple[Any, ...]:
        return Keys, (self.by_id,)


class Fetched(NamedTuple):
    """What is known of a batch's samples in the main process; see `TaggedBatch`."""

    ids: Tensor | None = None
    rows: int | None = None
    axes: tuple[int, ...] | None = None
    names: dict[int, Any] | None = None
    refusal: str = ""
    lengths: Tensor | None = None

    @classmethod
    def of(cls, tagged: TaggedBatch) -> Fetched:
        axes = None if tagged.axes is None else tuple(array("i", tagged.axes))
        names = None if tagged.keys is None else tagged.keys.by_id
        return cls(_int64s(tagged.ids), tagged.rows, axes, names, tagged.refusal, _int64s(tagged.lengths))


class Proxy:
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

    __class__ = property(lambda self: self._memsink_inner.__class__)  # of a proxy, what that stands for


class Samples(NamedTuple):
    """What a tagged data set returns: keys and samples, one each; or one key and what it fetched."""

    keys: Any
    samples: Any
    is_single: bool = False


class KeyedDataset(Proxy):
    """A map-style data set that returns samples together with their keys. It fetches as torch's own fetcher does."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return self._memsink_inner[key]

    def __getitems__(self, keys: Iterable[Any]) -> Samples:
        dataset = self._memsink_inner
        get_items = getattr(dataset, "__getitems__", None)
        samples = get_items(keys) if get_items else [dataset[key] for key in keys]
        return Samples(_counted(keys, dataset), samples)


class KeyedBatches(Proxy):
    """A map-style data set under ``batch_size=None``: a key fetches one sample or a batch, a list of keys a batch."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Samples:
        dataset = self._memsink_inner
        many = isinstance(key, list) or getattr(key, "ndim", 0) == 1
        return Samples(_counted(key if many else [key], dataset), dataset[key], not many)


class TaggingCollate:
    """The user's collate_fn, which gets the samples without their keys; what is known of them joins its result."""

    def __init__(self, collate: Callable[[Any], Any], layout: CollateLayout, is_batched: bool) -> None:
        self.collate = collate
        self.layout = layout
        self.is_batched = is_batched

    def __call__(self, fetched: Any) -> TaggedBatch:
        keyed = fetched if type(fetched) is Samples else Samples(None, fetched)
        batch = self.collate(keyed.samples)
        ids, keys, refusal = _identified(keyed.keys)
        if not self.is_batched:
            rows = None if ids is None or keyed.is_single else len(ids)
            refusal = refusal or (SINGLE if keyed.is_single else "")
            return TaggedBatch(None if ids is None else ids.tobytes(), rows, None, keys, refusal, batch)
        rows = len(keyed.samples) if isinstance(keyed.samples, Sized) else None
        layout = self.layout.of(keyed.samples, batch, ids)
        if layout.is_lost:
            ids, refusal = None, LOST
        elif layout.order is not None and ids is not None and len(ids) == len(layout.order):
            ids = array("q", [ids[n] for n in layout.order])
        axes = None if layout.axes is None else array("i", layout.axes).tobytes()
        lengths = joined_lengths(keyed.samples, batch)
        joined = None if lengths is None else array("q", lengths).tobytes()
        return TaggedBatch(None if ids is None else ids.tobytes(), rows, axes, keys, refusal, batch, joined)


LOST = "collate_fn puts samples into another order, which can't be identified by their values"
SINGLE = "DataLoader(batch_size=None) fetches this batch by one key, and it may be one sample or several"


def _identified(keys: Any) -> tuple[array[int] | None, Keys | None, str]:
    """Ids of keys, the keys that are no integers, and why there are none."""
    if keys is None:
        return None, None, ""
    try:
        return array("q", keys), None, ""
    except (TypeError, OverflowError):  # keys of another kind than row numbers
        pass
    refusal = refusal_of(keys)
    if refusal:
        return None, None, f"the sampler's keys can't be ids: {refusal}"
    ids = key_ids(keys)
    named = named_keys(ids, keys)
    return ids, Keys(named) if named else None, ""


def _counted(keys: Any, dataset: Any) -> list[Any] | None:
    """Keys in a list; a negative one counts from the end of the data set. None if there are no keys to go through."""
    if not isinstance(keys, Iterable):
        return None
    some = list(keys)
    if all(map(_is_plain_row, some)):
        return some
    some = [key.item() if isinstance(key, Tensor) and not key.ndim else key for key in some]
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        return some
    size = None
    for n, key in enumerate(some):
        if isinstance(key, int) and key < 0:
            size = len(dataset) if size is None else size
            some[n] = key + size if -size <= key else key
    return some


def _is_plain_row(key: Any) -> bool:
    return type(key) is int and key >= 0


def _int64s(raw: bytes | None) -> Tensor | None:
    if raw is None:
        return None
    return torch.frombuffer(bytearray(raw), dtype=torch.int64) if raw else torch.empty(0, dtype=torch.int64)
