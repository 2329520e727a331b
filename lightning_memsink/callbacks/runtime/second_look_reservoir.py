"""Whole batches of a stream, kept in host memory to be measured again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_memsink.callbacks.runtime.second_look_batches import LookBatch


class Reservoir:
    """A uniform random sample of the batches offered so far (Vitter 1985, algorithm R).

    A batch is copied only when it is taken, and of T batches about ``K log(T / K)`` are, K of which are kept.

    Args:
        samples: to keep at most, or one batch.
        seed: of the generator of its own.
    """

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.samples = samples
        self.failure = ""
        """Why a batch could not be copied."""
        self._random = random.Random(seed)
        self._offered = 0
        self._kept: list[LookBatch] = []
        self._largest = 1

    def __len__(self) -> int:
        return len(self._kept)

    def offer(self, size: int, described: Callable[[], LookBatch]) -> None:
        """Takes a batch of ``size`` samples, which is described only then, or does not. It keeps fewer batches where
        later ones are larger."""
        if self.samples <= 0:
            return
        self._offered += 1
        self._largest = max(self._largest, size)
        places = max(1, self.samples // self._largest)
        while len(self._kept) > places:
            self._kept.pop(self._random.randrange(len(self._kept)))
        place = self._random.randrange(self._offered)
        if len(self._kept) < places and self._offered <= places:
            place = len(self._kept)
        if place >= places:
            return
        try:
            batch = described()
            kept = batch._replace(batch=host_copy(batch.batch), ids=batch.ids.clone())
        except Exception as error:  # a batch of a kind that can't be copied must not end the training
            self.failure = f"{type(error).__name__}: {error}"
            return
        if place < len(self._kept):
            self._kept[place] = kept
        else:
            self._kept.append(kept)

    def batches(self, device: torch.device, most: int) -> Iterator[LookBatch]:
        """A copy of each batch that is kept, at most so many, on ``device``."""
        for batch in self._kept[:most]:
            yield batch._replace(batch=move_data_to_device(copy.deepcopy(batch.batch), device))

    def clear(self) -> None:
        """Forgets all batches."""
        self._kept.clear()
        self._offered = 0


def host_copy(batch: Any) -> Any:
    """A copy of a batch in host memory that shares nothing with it and has no graph."""
    detached = apply_to_collection(batch, Tensor, lambda tensor: tensor.detach())
    return copy.deepcopy(move_data_to_device(detached, torch.device("cpu")))
