"""Data whose order and place a checkpoint can bring back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler


class ByEpoch(Sampler[int]):
    """An order that follows from the epoch alone, which an exact resume needs."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class BatchesFrom(BatchSampler):
    """The batches of an epoch from the ``start``-th on, once; then whole epochs."""

    start = taken = 0

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        for self.taken, batch in enumerate(super().__iter__(), 1):
            if self.taken > start:
                yield batch


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """Its place in the epoch is in the checkpoint. Without workers, which would run ahead of training."""

    batch_sampler: BatchesFrom

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.batch_sampler.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.start = state["taken"]
