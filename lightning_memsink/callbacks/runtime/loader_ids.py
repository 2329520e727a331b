"""Ids of the batches that Lightning's training and validation loops fetch from their data loaders."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from lightning_memsink.samples.batch import describe
from lightning_memsink.samples.dataloader_ids import is_taggable, tag_loader, untag_loader
from lightning_memsink.samples.sample_ids import SampleIds

Stage = Literal["train", "validate"]
_LOADER_BITS = 48  # a row of loader n has the id (n << 48) + row: loaders stay apart, the first one's ids are its rows


class LoaderIds:
    """The ids of each batch of a `Trainer`, read from its data loaders where `sample_ids` identifies samples by row.

    Rows of a second, third, ... data loader of the same step are offset by a multiple of 2^48. Train and validation ids
    are not kept apart.
    """

    def __init__(self, sample_ids: SampleIds) -> None:
        self.sample_ids = sample_ids
        self._trainer: Trainer | None = None
        self._fetched: dict[Stage, _FetchedIds] = {"train": _FetchedIds(), "validate": _FetchedIds()}
        self._overridden: dict[str, Any] = {}

    def attach(self, trainer: Trainer) -> None:
        """Tags each loader that `trainer` sets up from now on, after its strategy has processed the loader."""
        if self._trainer is not None:
            return
        self._trainer = trainer
        if not self.sample_ids.uses_index:
            return
        strategy = trainer.strategy
        self._overridden = {name: value for name, value in vars(strategy).items() if name == "process_dataloader"}
        process_dataloader = strategy.process_dataloader

        def process_and_tag(loader: object) -> object:
            return self._tag(process_dataloader(untag_loader(loader)))

        vars(strategy)["process_dataloader"] = process_and_tag

    def detach(self) -> None:
        """Restores the strategy and the loaders; for `teardown` and `on_exception`."""
        if self._trainer is None:
            return
        if self.sample_ids.uses_index:
            vars(self._trainer.strategy).pop("process_dataloader", None)
            vars(self._trainer.strategy).update(self._overridden)
        for combined in self._combined_loaders():
            combined.flattened = [untag_loader(loader) for loader in combined.flattened]
        self._trainer = None
        self.clear("train")
        self.clear("validate")

    def take(self, batch: Any, stage: Stage) -> Tensor | None:
        """The ids of a batch: ``[B]`` int64 on the CPU; of several loaders, one after the other.

        Call it once for each batch that starts. None for a batch without key, index or tensors.
        """
        fetched, combined = self._fetched[stage], self._combined_loader(stage)
        if combined is None or combined._mode == "sequential":
            return self.sample_ids.of(batch, fetched.take())
        try:
            parts = combined._spec.flatten_up_to(batch)
        except ValueError:  # a hook of the user's has made one batch of what the loaders gave
            index = _concatenated([fetched.take(loader) for loader in range(len(combined.flattened))])
            return self.sample_ids.of(batch, index)
        # a part is None where its loader is exhausted
        return _concatenated(
            [self.sample_ids.of(part, fetched.take(n)) for n, part in enumerate(parts) if part is not None]
        )

    def clear(self, stage: Stage) -> None:
        """Forgets batches that were fetched and not taken. A new pass over the loaders does so by itself."""
        self._fetched[stage].clear()

    def _tag(self, loader: Any) -> object:
        if is_taggable(loader):
            return tag_loader(loader, self._on_fetch)
        if self.sample_ids.identity == "index":
            raise self.sample_ids.index_error(f"got {describe(loader)}")
        return loader

    def _on_fetch(self, batches: object, ids: Tensor | None) -> None:
        """Notes the ids of a batch that a loop fetched; the user may iterate over the same loader in between."""
        for stage, fetched in self._fetched.items():
            combined = self._combined_loader(stage)
            combined_pass = None if combined is None else combined._iterator
            for position, iterator in enumerate([] if combined_pass is None else combined_pass.iterators):
                if iterator is batches:
                    loader = getattr(combined_pass, "_iterator_idx", position)  # sequential mode: one at a time
                    offset = ids + (loader << _LOADER_BITS) if ids is not None and loader else ids
                    fetched.put(combined_pass, loader, offset)

    def _combined_loaders(self) -> Iterator[CombinedLoader]:
        assert self._trainer is not None
        fit = self._trainer.fit_loop
        for loop in (fit, fit.epoch_loop.val_loop, self._trainer.validate_loop):
            if loop._combined_loader is not None:
                yield loop._combined_loader

    def _combined_loader(self, stage: Stage) -> CombinedLoader | None:
        if self._trainer is None:
            return None
        fit = self._trainer.fit_loop
        if stage == "train":
            return fit._combined_loader
        is_validate = self._trainer.state.fn == "validate"
        return (self._trainer.validate_loop if is_validate else fit.epoch_loop.val_loop)._combined_loader


class _FetchedIds:
    """Ids of the batches that a loop has fetched and not started yet, oldest first."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._pass: weakref.ref[Any] | None = None
        self._ids: deque[tuple[int, Tensor | None]] = deque()

    def put(self, combined_pass: object, loader: int, ids: Tensor | None) -> None:
        """Appends ``ids`` of a batch of ``loader``. A new pass drops the batches that the last one prefetched."""
        if self._pass is None or self._pass() is not combined_pass:
            self.clear()
            self._pass = weakref.ref(combined_pass)
        self._ids.append((loader, ids))

    def take(self, loader: int | None = None) -> Tensor | None:
        """Removes and returns the oldest ids of one loader, or of any."""
        position = next((i for i, (owner, _) in enumerate(self._ids) if loader in (None, owner)), None)
        if position is None:
            return None
        _, ids = self._ids[position]
        del self._ids[position]
        return ids


def _concatenated(ids: list[Tensor | None]) -> Tensor | None:
    if len(ids) == 1:
        return ids[0]
    known = [part for part in ids if part is not None]
    return torch.cat(known) if known and len(known) == len(ids) else None
