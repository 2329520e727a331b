"""Data whose every number says which row it belongs to, and a check of owners against these numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.batch_rows import rows_of
from lightning_memsink.samples.sample_ids import SampleIds
from tests.support.loaders import Watch, fit

BASE = 1000


def coded(row: int, *shape: int) -> Tensor:
    """Numbers ``BASE * (row + 1) + 0, 1, 2, ...`` of a shape."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return (BASE * (row + 1) + torch.arange(count)).reshape(shape)


class CodedRows(Dataset[dict[str, Any]]):
    """Row i as ``make(i)``, by default a text of 3 to 8 tokens, an image and a label of few values."""

    def __init__(self, make: Callable[[int], Any] | None = None, count: int = 24) -> None:
        self.make = make or text
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.make(row % self.count)


class CodedStream(IterableDataset[Any]):
    """The same rows as a stream without keys."""

    def __init__(self, make: Callable[[int], Any], count: int = 24) -> None:
        self.make, self.count = make, count

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.make(row) for row in range(first, self.count, step))


def text(row: int) -> dict[str, Any]:
    return {"x": coded(row, 3 + row * 5 % 6), "label": row % 2}


class Checked(Watch):
    """Compares the owners that are claimed of each batch with its numbers."""

    def __init__(self, ids: LoaderIds, has_rows: bool = True) -> None:
        super().__init__(ids)
        self.has_rows = has_rows
        self.claimed: list[set[str]] = []
        """By batch the shapes of tensors whose owners are known, without those of one axis."""

    def take(self, batch: Any, stage: Any) -> None:
        ids = self.ids.take(batch, stage)
        self.taken[stage].append(None if ids is None else ids.tolist())
        claimed = set()
        for tensor, owners in rows_of(batch, 0 if ids is None else len(ids), self.ids.axes):
            check_owners(tensor, owners, ids if self.has_rows else None)
            claimed.add("x".join(map(str, owners.shape)))
        self.claimed.append(claimed)


def check_owners(tensor: Tensor, owners: Tensor, ids: Tensor | None) -> None:
    """Every number of ``tensor`` that says a row must say that of its owner. Smaller ones are labels and padding.

    Without ``ids`` every owner must have the numbers of one row, and no other owner that row.
    """
    row = (tensor.long() // BASE - 1).flatten()
    claimed = owners.expand(tensor.shape).flatten()[row >= 0]
    row = row[row >= 0]
    if ids is not None:
        assert torch.equal(row, ids[claimed])
    elif len(row):
        pairs = torch.stack([row, claimed], 1).unique(dim=0)
        assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique())


class Idle(LightningModule):
    """Trains on nothing of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(torch.ones(1, 2)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit_checked(
    loader: Any, model: LightningModule | None = None, identity: Any = "auto", has_rows: bool = True, **options: Any
) -> Checked:
    """A fit whose claimed owners are all checked: against ids that are rows, or else among themselves."""
    watch = Checked(LoaderIds(SampleIds(identity)), has_rows)
    first = options.pop("first", [])
    fit(loader, ids=False, model=model or Idle(), callbacks=[*first, watch], **options)
    return watch


def rows_in(batch: Any) -> list[int]:
    """The rows in the first numbers of each sample of a batch-first tensor."""
    return (batch.reshape(len(batch), -1)[:, 0] // BASE - 1).tolist()


def loader_of(make: Any = None, collate: Any = None, batch_size: int = 4, workers: int = 0, **options: Any) -> Any:
    return DataLoader(
        CodedRows(make, options.pop("count", 24)), batch_size, collate_fn=collate, num_workers=workers, **options
    )
