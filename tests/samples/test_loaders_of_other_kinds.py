"""Loaders without automatic batching, several loaders at once, and batches of odd sizes: ids are right or refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.batch_rows import rows_of
from lightning_memsink.samples.sample_ids import SampleIds
from tests.support.coded_rows import BASE, CodedRows, Idle, coded, fit_checked, loader_of
from tests.support.loaders import LOADER, QUIET, Model, Rows, Watch, fit

pytestmark = QUIET


class Columns(Dataset[Any]):
    """A data set that makes a batch of several keys by itself, as those of Hugging Face and Arrow tables do."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, keys: Any) -> Any:
        return default_collate([Rows()[int(key)] for key in keys]) if isinstance(keys, list) else Rows()[int(keys)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_keys_of_whole_batches_are_the_rows_of_their_samples(workers, drop_last):
    sampler = BatchSampler(RandomSampler(range(22)), 4, drop_last)
    watch, model, _ = fit(DataLoader(Columns(), batch_size=None, sampler=sampler, num_workers=workers))
    assert watch.taken["train"] == model.rows["train"] and watch.ids.sample_ids.source == "index"


class Single(Model):
    """Its step puts a sample axis onto the sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rows["train"].append([int(batch["row"])])
        return self.layer(torch.ones(1, 2)).sum()


class Images(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, key: int) -> Any:
        return coded(key, 3, 5, 5).float()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_without_a_sample_axis_is_refused(workers):
    """Its channels are no three samples."""
    with pytest.warns(UserWarning, match=r"batch_size=None\) fetches this batch by one key.*Put batch\['sample_id'\]"):
        watch, _, _ = fit(DataLoader(Images(), batch_size=None, num_workers=workers), model=Idle())
    assert watch.taken["train"] == [None] * 12
    with pytest.raises(RuntimeError, match=r"needs DataLoaders that .*batch_size=None"):
        fit(DataLoader(Images(), batch_size=None), ids=LoaderIds(SampleIds("index")), model=Idle())


def test_a_sample_of_one_row_has_the_id_of_its_key():
    single = [{name: torch.as_tensor(part)[None] for name, part in Rows()[row].items()} for row in range(7)]
    watch, model, _ = fit(DataLoader(single, batch_size=None, shuffle=True))
    assert watch.taken["train"] == model.rows["train"] and watch.ids.sample_ids.source == "index"


def test_own_ids_are_taken_without_automatic_batching():
    batches = [{"x": coded(row, 3, 3).float(), "sample_id": [f"{row}-{n}" for n in range(3)]} for row in range(4)]
    ids = LoaderIds(SampleIds())
    watch, _, _ = fit(DataLoader(batches, batch_size=None), ids=ids, model=Idle())
    assert [ids.sample_ids.names.of(taken) for taken in watch.taken["train"]] == [b["sample_id"] for b in batches] * 2


def both(workers: int, start: int = LOADER) -> list[Any]:
    """Three and two samples a batch. Rows of the second begin at ``start``."""
    return [
        DataLoader(Rows(15), 3, shuffle=True, num_workers=workers),
        DataLoader(Rows(8, start=start), 2, shuffle=True, num_workers=workers),
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_two_loaders_with_other_batch_sizes_in_every_mode(mode, workers):
    if mode == "sequential":
        validate = CombinedLoader(both(workers, start=0), mode)  # the validation step adds the loader's number
        watch, model, _ = fit(DataLoader(Rows(), 4), validate)
        assert watch.taken["validate"] == model.rows["validate"] and len(model.rows["validate"]) > 9
        return
    watch, model, _ = fit(CombinedLoader(both(workers), mode))
    assert watch.taken["train"] == model.rows["train"]
    assert {len(ids) for ids in watch.taken["train"]} <= {5, 4, 3, 2}


@pytest.mark.parametrize("structure", [list, lambda loaders: {"a": loaders[0], "b": loaders[1]}], ids=["list", "dict"])
def test_owners_of_two_loaders_are_counted_through(structure):
    """The second loader's samples come after those of the first, also where both batches are square."""

    class Check(Idle):
        claimed = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (ids,) = watch.taken["train"][-1:]
            for tensor, owners in rows_of(batch, len(ids), watch.ids.axes):
                rows = torch.tensor(ids)[owners].expand(tensor.shape) % LOADER
                assert torch.equal(tensor // BASE - 1, rows)
                self.claimed += 1
            return super().training_step(batch, batch_idx)

    def time_major(samples: Any) -> Tensor:
        return torch.stack([sample["x"] for sample in samples], 1)

    rows = CodedRows(lambda row: {"x": coded(row, 4)}, 12)
    watch, model = Watch(LoaderIds(SampleIds("index"))), Check()
    loaders = [DataLoader(rows, 4, collate_fn=time_major), DataLoader(rows, 2, shuffle=True)]
    fit(CombinedLoader(structure(loaders), "max_size_cycle"), ids=False, model=model, callbacks=[watch])
    assert model.claimed == 2 * len(watch.taken["train"])


class Augmenting(IterableDataset[Any]):
    """Each sample several times, changed at random."""

    def __iter__(self) -> Iterator[Any]:
        for row in range(8):
            for _ in range(3):
                yield {"x": coded(row, 4) + torch.randn(4), "sample_id": row}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_augmenting_stream_with_ids_has_a_sample_several_times_in_a_batch(workers):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch, _, _ = fit(DataLoader(Augmenting(), 6, num_workers=workers), model=Idle(), max_epochs=1)
    assert sorted(id for batch in watch.taken["train"] for id in batch) == sorted([*range(8)] * 3 * max(1, workers))
    assert not [each for each in caught if "other content" in str(each.message)]


def test_duplicate_and_negative_keys_of_a_sampler():
    watch, model, _ = fit(DataLoader(Rows(), 3, sampler=[5, 5, -1, -22, 0, 5]))
    assert watch.taken["train"] == model.rows["train"] == [[5, 5, 21], [0, 0, 5]] * 2


def test_missing_ids_are_refused():
    def collate(samples: Any) -> Any:
        return {**default_collate(samples), "sample_id": [None if row["row"] == 2 else row["row"] for row in samples]}

    with pytest.raises(RuntimeError, match=r"in batch\['sample_id'\], but found None"):
        fit(DataLoader(Rows(), 4, collate_fn=collate))


def test_an_empty_batch_has_no_ids():
    def collate(samples: Any) -> Any:
        return {"x": torch.zeros(0, 2), "row": torch.zeros(0, dtype=torch.int64)}

    with pytest.warns(UserWarning, match="4 rows were fetched for 0 samples"):
        watch, _, _ = fit(DataLoader(Rows(8), 4, collate_fn=collate), model=Idle())
    assert watch.taken["train"] == [[], []] * 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "collate",
    [None, lambda samples: samples, lambda samples: (torch.stack([s["x"] for s in samples]), samples[0]["label"])],
    ids=["default", "list", "tuple"],
)
def test_a_batch_of_one(collate, workers):
    loader = loader_of(lambda row: {"x": coded(row, 1, 5), "label": row % 2}, collate, 1, workers, shuffle=True)
    watch = fit_checked(loader)
    assert all(len(ids) == 1 for ids in watch.taken["train"])
    assert sorted(id for (id,) in watch.taken["train"]) == sorted([*range(24)] * 2)
