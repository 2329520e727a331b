"""A data loader that resumes within an epoch: Lightning saves and restores its position through ``state_dict``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler


class EpochShuffledSampler(Sampler[int]):
    """Shuffles with the epoch's number as seed, so that a resumed epoch has the same order."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class ResumableBatchSampler(BatchSampler):
    """Skips the first ``start`` batches of its next epoch; later epochs are whole."""

    start = taken = 0

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        for self.taken, batch in enumerate(super().__iter__(), 1):
            if self.taken > start:
                yield batch


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """Saves how many batches of the epoch it has served. Use it without workers, which fetch ahead of training."""

    batch_sampler: ResumableBatchSampler

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.batch_sampler.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.start = state["taken"]
