"""Rows fetched once more: in the batches asked for, and without a trace in their own loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lightning_memsink.samples.dataloader_ids import tag_loader
from lightning_memsink.samples.refetching import refetch, refetch_refusal, rows_a_batch
from tests.support.loaders import LOADERS, Rows, Stream, Together, rows_of


def rows(loader: Any, batches: list[list[Any]]) -> list[Any]:
    """The rows of each batch, and the ids that it was fetched with; or the error."""
    found = []
    for each in refetch(loader, batches, 0):
        if isinstance(each, Exception):
            found.append(each)
        else:
            batch, fetched = each
            assert fetched.ids is not None and [id % 22 for id in fetched.ids.tolist()] == rows_of(batch)
            found.append(rows_of(batch))
    return found


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in ("leaves batches out", "spawn")])
@pytest.mark.parametrize("is_tagged", [False, True])
def test_any_loader_over_rows_gives_the_rows_that_are_asked_for(name, is_tagged):
    own = LOADERS[name]()
    loader = tag_loader(own, lambda *_: None) if is_tagged else own
    before, drawn = dict(vars(own)), torch.get_rng_state()
    assert rows(loader, [[3, 1], [21], [5, 5, 0]]) == [[3, 1], [21], [5, 5, 0]]
    assert vars(own) == before and torch.equal(torch.get_rng_state(), drawn)


class Raising(Rows):
    def __getitem__(self, key: Any) -> Any:
        if key in (4, 5):
            raise OSError(f"no row {key}")
        return super().__getitem__(key)


class RaisingTogether(Raising, Together):
    pass


@pytest.mark.parametrize("data", [Raising, RaisingTogether])
@pytest.mark.parametrize("workers", [0, 1])
def test_another_row_of_the_batch_takes_the_place_of_one_that_raises(data, workers):
    loader = DataLoader(data(), 4, num_workers=workers)
    first, second, third = rows(loader, [[4, 1, 2], [5, 4], [6, 5]])
    assert (first, third) == ([1, 1, 2], [6, 6])
    assert "no row 5" in str(second) and isinstance(second, OSError)


def failing(samples: list[Any]) -> Any:
    raise ValueError("no batch of these")


def test_a_collate_function_that_raises_ends_nothing():
    found = rows(DataLoader(Rows(), 4, collate_fn=failing), [[1], [2]])
    assert [str(each) for each in found] == ["no batch of these"] * 2


class Endless(DataLoader):
    """An iterator that raises for ever."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise ValueError("never")


def test_an_iterator_that_raises_for_ever_is_left():
    assert len(rows(Endless(Rows(), 4), [[1], [2]])) == 5


class Restarting(DataLoader):
    """As a loader of torchdata, whose iteration reads and writes a state of its own."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the state of the user's loader")


Restarting.__module__ = "torchdata.stateful_dataloader.stateful_dataloader"


def test_a_loader_with_a_state_of_its_own_is_not_iterated():
    assert rows(Restarting(Rows(), 4), [[1, 2]]) == [[1, 2]]


class WhoFetches(Rows):
    def __getitem__(self, key: Any) -> Any:
        worker = get_worker_info()
        return {**super().__getitem__(key), "worker": -1 if worker is None else worker.num_workers}


@pytest.mark.parametrize(("workers", "expected"), [(0, -1), (2, 1)])
def test_one_worker_fetches_where_there_are_workers(workers, expected):
    (batch, _), *_ = refetch(DataLoader(WhoFetches(), 2, num_workers=workers, persistent_workers=workers > 0), [[1]], 0)
    assert batch["worker"].tolist() == [expected]


def test_what_cannot_be_fetched_by_row_is_told_apart():
    assert refetch_refusal(DataLoader(Rows(), 4)) == ""
    assert "stream" in refetch_refusal(DataLoader(Stream(), 4))
    assert "batch_size=None" in refetch_refusal(DataLoader(Rows(), None))
    assert "list" in refetch_refusal([Tensor()])


def test_the_size_of_a_batch_is_the_loaders_or_what_was_seen():
    assert rows_a_batch(DataLoader(Rows(), 4), 9) == 4
    assert rows_a_batch(LOADERS["batch sampler"](), 9) == 5
    assert rows_a_batch(LOADERS["ragged batches"](), 9) == 9
