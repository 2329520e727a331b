"""Data loaders whose samples know their own row, and fits that record the ids taken and the rows of each step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.sample_ids import SampleIds

QUIET = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning", "FutureWarning")
]

LOADER = 1 << 48
"""Difference between the ids of equal rows in two loaders."""


class Rows(Dataset):
    """Row i is ``{"x": [i, i], "row": start + i}``; later rows may come sooner."""

    def __init__(self, count: int = 22, start: int = 0, wait: float = 0.0) -> None:
        self.count, self.start, self.wait = count, start, wait

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> dict[str, Any]:
        row = int(key) % self.count
        time.sleep(self.wait * (row % 3 == 0))
        return {"x": torch.full((2,), float(row)), "row": self.start + row}


class Together(Rows):
    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        yield from (Rows()[i] for i in range(worker.id if worker else 0, 22, worker.num_workers if worker else 1))


class Odd(DataLoader):
    """A loader with its own ``__iter__``, which leaves out every other batch."""

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(super().__iter__()):
            assert set(batch) == {"x", "row"}
            if number % 2:
                yield batch


class Ahead(DataLoader):
    """A loader that fetches two batches ahead."""

    def __iter__(self) -> Iterator[Any]:
        waiting = []
        for batch in super().__iter__():
            waiting.append(batch)
            if len(waiting) > 2:
                yield waiting.pop(0)
        yield from waiting


class Model(LightningModule):
    """Records the rows that its steps see, and whether a hook before them sees another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.rows: dict[str, list[list[int]]] = {"train": [], "validate": []}
        self.kinds: set[type] = set()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.kinds.add(type(batch))
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rows["train"].append(rows_of(batch))
        return self.layer(torch.ones(1, 2)).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.rows["validate"].append([row + dataloader_idx * LOADER for row in rows_of(batch)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Watch(Callback):
    """Records the ids taken from each batch."""

    def __init__(self, ids: LoaderIds) -> None:
        self.ids = ids
        self.taken: dict[str, list[list[int] | None]] = {"train": [], "validate": []}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.ids.attach(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.take(batch, "train")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.take(batch, "validate")

    def take(self, batch: Any, stage: Any) -> None:
        ids = self.ids.take(batch, stage)
        self.taken[stage].append(None if ids is None else ids.tolist())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.ids.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.ids.detach()


def rows_of(batch: Any) -> list[int]:
    """The rows in a batch of any of the shapes below; a loader's number times 2^48 is in its rows already."""
    if isinstance(batch, dict) and "row" in batch:
        return torch.as_tensor(batch["row"]).tolist()
    if isinstance(batch, dict):
        return [row for part in batch.values() if part is not None for row in rows_of(part)]
    if isinstance(batch, Pair):
        return batch.row.tolist()
    if isinstance(batch[0], str):
        return [int(word) for word in batch]
    if isinstance(batch[-1], Tensor):
        return batch[-1].tolist()
    return [row for part in batch if part is not None for row in rows_of(part)]


def fit(
    train: Any, validate: Any = None, ids: LoaderIds | None = None, model: Model | None = None, ckpt=None, **options
):
    """A fit that is watched unless `ids` is False."""
    seed_everything(1, verbose=False)
    model, watch = model or Model(), Watch(ids or LoaderIds(SampleIds()))
    plain = {"logger": False, "enable_checkpointing": False, "max_epochs": 2, "accelerator": "cpu", "devices": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    callbacks = options.pop("callbacks", []) + ([] if ids is False else [watch])
    trainer = Trainer(**(plain | quiet | options), callbacks=callbacks)
    trainer.fit(model, train, validate, ckpt_path=ckpt)
    return watch, model, trainer


@dataclass
class Pair:
    x: Tensor
    row: Tensor


def to_pair(samples: list[dict[str, Any]]) -> Pair:
    return Pair(**default_collate(samples))


def to_tuple(samples: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(default_collate(samples).values())


def to_words(samples: list[dict[str, Any]]) -> list[str]:
    return [str(sample["row"]) for sample in samples]


def set_up_rows(worker: int) -> None:
    rows = get_worker_info().dataset
    assert isinstance(rows, Rows) and rows.start == 0
    rows.wait = 0.001


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(Rows(), 4),
    "shuffled": lambda: DataLoader(Rows(), 4, shuffle=True),
    "drop_last": lambda: DataLoader(Rows(), 4, shuffle=True, drop_last=True),
    "2 workers": lambda: DataLoader(Rows(), 4, shuffle=True, num_workers=2, worker_init_fn=set_up_rows),
    "persistent": lambda: DataLoader(Rows(), 4, shuffle=True, num_workers=2, persistent_workers=True),
    "prefetch": lambda: DataLoader(Rows(), 4, shuffle=True, num_workers=2, prefetch_factor=5),
    "spawn": lambda: DataLoader(
        Rows(), 4, shuffle=True, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    ),
    "out of order": lambda: DataLoader(Rows(wait=0.02), 2, shuffle=True, num_workers=2, in_order=False),
    "getitems": lambda: DataLoader(Together(), 4, shuffle=True),
    "sampler": lambda: DataLoader(Rows(), 4, sampler=[5, 3, -1, 3, -22, 21]),
    "batch sampler": lambda: DataLoader(Rows(), batch_sampler=BatchSampler(RandomSampler(Rows()), 5, False)),
    "ragged batches": lambda: DataLoader(Rows(), batch_sampler=[(0,), (3, 2, 1), torch.tensor([7, 7])]),
    "weighted": lambda: DataLoader(Rows(), 4, sampler=WeightedRandomSampler([1.0] * 22, 30)),
    "rank 0 of 2": lambda: DataLoader(Rows(), 4, sampler=DistributedSampler(Rows(), 2, 0)),
    "rank 1 of 2": lambda: DataLoader(Rows(), 4, sampler=DistributedSampler(Rows(), 2, 1)),
    "leaves batches out": lambda: Odd(Rows(), 3, shuffle=True),
    "fetches ahead": lambda: Ahead(Rows(), 3, shuffle=True, num_workers=1, persistent_workers=True),
    "tuple": lambda: DataLoader(Rows(), 4, shuffle=True, collate_fn=to_tuple),
    "dataclass": lambda: DataLoader(Rows(), 4, shuffle=True, collate_fn=to_pair, num_workers=1),
    "strings": lambda: DataLoader(Rows(), 4, shuffle=True, collate_fn=to_words, num_workers=1),
}
