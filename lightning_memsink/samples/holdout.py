"""Splits controls off the training set before training, where there is no validation set of the same kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler, Subset


class WithoutHeldOut(Sampler[int]):
    """The keys of another sampler, in its order, without those held out."""

    def __init__(self, sampler: Sampler[int], held_out: frozenset[int]) -> None:
        self.sampler = sampler
        self.held_out = held_out

    def __iter__(self) -> Iterator[int]:
        return (key for key in self.sampler if key not in self.held_out)

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        return len(self.sampler) - len(self.held_out)


def holdout_split(loader: Any, fraction: float) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A training loader without ``fraction`` of its samples, and a loader of just these.

    The held-out samples depend on the data set's length alone, so a resumed run holds out the same ones. The user's
    loader is unchanged, and neither loader draws more random numbers than it did.

    Raises:
        ValueError: for a loader that samples can't be taken out of without changing how it samples.
    """
    sampler = getattr(loader, "sampler", None)
    plain = isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
    if not plain or type(sampler).__name__ not in ("RandomSampler", "SequentialSampler"):
        raise ValueError(
            "control_fraction needs a map-style data set in a DataLoader that shuffles or goes in order, but the "
            f"training loader is {type(loader).__name__} with {type(sampler).__name__}. Hold the controls out "
            "yourself and pass them as the validation loader, or as LossTracker(controls=loader)."
        )
    size = len(loader.dataset)
    many = max(1, round(fraction * size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    held_out = frozenset(order[:many].tolist())
    kept = copy.copy(loader)
    remaining = WithoutHeldOut(loader.sampler, held_out)
    batches = BatchSampler(remaining, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
    vars(kept).update(sampler=remaining, batch_sampler=batches, _iterator=None)
    controls: DataLoader[Any] = DataLoader(
        Subset(loader.dataset, sorted(held_out)),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(size),
    )
    return kept, controls
