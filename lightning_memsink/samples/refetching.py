"""Rows of a map-style data set fetched once more, as their own loader would, in batches of one's choosing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_memsink.samples.dataloader_ids import fetches_by_key, tag_loader
from lightning_memsink.samples.tagged_batch import Fetched, Proxy


def user_loader(loader: Any) -> Any:
    """The loader behind a view of `tag_loader`, which is left as it is; anything else itself."""
    return getattr(loader, "_memsink_loader", loader)


def refetch_refusal(loader: Any) -> str:
    """Why rows can't be fetched again from ``loader``; empty if they can."""
    loader = user_loader(loader)
    if not isinstance(loader, DataLoader):
        return f"{type(loader).__name__} is no DataLoader of torch"
    if not fetches_by_key(loader):
        return f"{type(loader.dataset).__name__} is a stream"
    if loader.batch_sampler is None:
        return "DataLoader(batch_size=None) fetches by keys that may be whole batches"
    return ""


def rows_a_batch(loader: Any, otherwise: int) -> int:
    """Rows in one of the loader's batches. A sampler of batches need not say it."""
    loader = user_loader(loader)
    sizes = (loader.batch_size, getattr(loader.batch_sampler, "batch_size", None), otherwise)
    return next(size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size > 0)


def refetch(loader: Any, batches: Sequence[Sequence[Any]], seed: int) -> Iterator[tuple[Any, Fetched] | Exception]:
    """Each of the ``batches`` of keys as the loader's own collate function makes it, and what is known of its samples.

    Where the loader has workers, one of the same kind fetches them. Sampler, generators and workers of the loader are
    not touched. A key whose row raises is left out: another one of its batch takes its place. If all rows raise, or the
    collate function does, the exception is yielded in the place of the batch.

    Args:
        loader: without a `refetch_refusal`.
        batches: keys of each batch.
        seed: of the worker's random numbers.
    """
    fetched: list[Fetched | None] = []
    own = _own_loader(user_loader(loader), [list(batch) for batch in batches], seed)
    iterator = iter(tag_loader(own, lambda _, batch, known: fetched.append(known)))
    for _ in range(2 * len(batches) + 1):  # an iterator of the user's may raise for ever
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            yield error
            continue
        if batch is not None:
            yield batch, (fetched[-1] if fetched else None) or Fetched()
        fetched.clear()


class _Surviving(Proxy):
    """A map-style data set in whose batches rows that raise are replaced by others of the batch."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return self._memsink_inner[key]

    def __getitems__(self, keys: list[Any]) -> Any:
        """The samples of ``keys``. Of a row that raises, the key too is replaced in the list: what reads it to name
        the samples finds the one that is there."""
        dataset = self._memsink_inner
        together = getattr(dataset, "__getitems__", None)
        if together is not None:
            try:
                return together(keys)
            except Exception:  # one row of them: which one?
                pass
        samples: dict[int, Any] = {}
        failure: Exception | None = None
        for n, key in enumerate(keys):
            try:
                samples[n] = dataset[key] if together is None else together([key])[0]
            except Exception as error:
                failure = failure or error
        if failure is not None and not samples:
            raise failure
        for n in range(len(keys)):
            if n not in samples:
                other = next(iter(samples))
                keys[n], samples[n] = keys[other], samples[other]
        return [samples[n] for n in range(len(keys))]


def _own_loader(loader: DataLoader[Any], batches: list[list[Any]], seed: int) -> DataLoader[Any]:
    """A loader of the same data set that shares no state with ``loader``.

    It is of the user's class where that has an ``__iter__`` of its own, which may change batches.
    """
    kind = type(loader)
    is_torchs = kind.__iter__ is DataLoader.__iter__ or kind.__module__.partition(".")[0] == "torchdata"
    own: DataLoader[Any] = DataLoader.__new__(DataLoader if is_torchs else kind)
    vars(own).update(vars(loader))
    vars(own).update(  # DataLoader.__setattr__ refuses these
        dataset=_Surviving(loader.dataset),
        batch_sampler=batches,
        sampler=batches,
        num_workers=min(1, loader.num_workers),
        persistent_workers=False,
        pin_memory=False,
        generator=torch.Generator().manual_seed(seed),
        _iterator=None,
    )
    return own
