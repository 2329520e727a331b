"""Ids of the batches that Lightning's training and validation loops fetch from their data loaders."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.fetched_batches import (
    FetchedBatch,
    FetchedBatches,
    Inputs,
    concatenated,
    fetched_parts,
)
from lightning_memsink.callbacks.runtime.host_batches import HostBatches
from lightning_memsink.samples.batch import describe, tensors_in
from lightning_memsink.samples.batch_rows import Axes, Entry, rows_of
from lightning_memsink.samples.control_overlap import ControlOverlap
from lightning_memsink.samples.dataloader_ids import fetches_by_key, is_taggable, tag_loader, untag_loader
from lightning_memsink.samples.id_contents import Contents, IdContents
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.tagged_batch import Fetched
from lightning_memsink.samples.tokens import Tokens, stack

Stage = Literal["train", "validate"]

REORDERED = (
    "Rows of a batch were changed between the loader and the step, and nothing shows any more which sample each of "
    "them is: no losses are recorded for such a batch. Put batch[{key!r}] with one id for each sample into the batch, "
    "and let it be shuffled with the rest."
)
ANEW = (
    "A row number of this data set doesn't name one sample (are documents packed anew, or samples drawn at random?), "
    "so its losses are those of several. Use LossTracker(identity='content'), or put batch[{key!r}] into the batch "
    "with an id that stays with its content."
)
TEXTS = (
    "Texts are the samples here, and one that never comes again has a single visit and no verdict. If they are padded, "
    "put batch['attention_mask'] into the batch; if rows are other views of the same sample each time, use "
    "LossTracker(identity='index'); if documents are cut anew, put batch[{key!r}] into the batch with an id that stays "
    "with each document."
)
NOT_UNIQUE = (
    "batch[{key!r}] doesn't name one sample (are rows numbered within shards, or documents packed anew?), so its "
    "losses are those of several. Make it unique, as in f'{{shard}}-{{row}}', or use LossTracker(identity='content'). "
    "Texts that share an id are taken for windows of one document: if they are, all is well."
)


class LoaderIds:
    """The ids of each batch of a `Trainer`, read from its data loaders where `sample_ids` identifies samples by row.

    Where the samples lie in the batch's tensors is read from the loaders for any identity. Rows of a second, third, ...
    data loader of the same step are offset by a multiple of 2^48. Train and validation ids are not kept apart.
    """

    def __init__(self, sample_ids: SampleIds) -> None:
        self.sample_ids = sample_ids
        self.axes: Axes | None = None
        """Of the batch taken last, where its samples lie in each tensor, for `samples.batch_rows.rows_of`."""
        self.readable: Any = None
        """The batch taken last, in host memory where it can be read there; for the user's functions it is none."""
        self.is_same: Tensor | None = None
        """Bool ``[]`` on the device: whether `readable` has the values that the step got. None where that is known."""
        self.hosts: dict[Stage, HostBatches] = {"train": HostBatches(), "validate": HostBatches()}
        """Whether batches can be read in host memory."""
        self._trainer: Trainer | None = None
        self._fetched: dict[Stage, FetchedBatches] = {"train": FetchedBatches(), "validate": FetchedBatches()}
        self._contents = IdContents()
        self.overlap = ControlOverlap()
        """Which controls have the input of a training sample. Where ids are hashes of texts it knows of none: there
        equal ids say it."""
        self._ids_are_texts = False
        self._rows_of: weakref.ref[Any] | None = None  # the training data whose rows `overlap` knows
        self._warnings = WarningCache()
        self._overridden: dict[str, Any] = {}

    def attach(self, trainer: Trainer) -> None:
        """Tags each loader that `trainer` sets up from now on, after its strategy has processed the loader."""
        if self._trainer is not None:
            return
        self._trainer = trainer
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
        vars(self._trainer.strategy).pop("process_dataloader", None)
        vars(self._trainer.strategy).update(self._overridden)
        for combined in self._combined_loaders():
            combined.flattened = [untag_loader(loader) for loader in combined.flattened]
        self._trainer = self._rows_of = None
        self.clear("train")
        self.clear("validate")

    def take(self, batch: Any, stage: Stage) -> Tensor | None:
        """The ids of a batch: ``[B]`` int64 on the CPU; of several loaders, one after the other.

        Call it once for each batch that starts. None for a batch without key, index or tensors, and for one whose rows
        are no longer in the order in which they were fetched, if that order can't be identified. `axes` is then known.
        """
        fetched, combined = self._fetched[stage], self._combined_loader(stage)
        self.axes, self.readable, self.is_same = None, batch, None
        if combined is None or combined._mode == "sequential":
            return self._ids_of(batch, fetched.take(), stage)
        try:
            parts = list(fetched_parts(combined, batch))
        except ValueError:
            return self._merged_ids(batch, [fetched.take(loader) for loader in range(len(combined.flattened))])
        if len(combined.flattened) == 1:
            if not parts:
                return None
            alone = self._ids_of(parts[0][1], fetched.take(0), stage)
            self.readable = batch if self.readable is parts[0][1] else combined._spec.unflatten([self.readable])
            return alone
        ids: list[Tensor | None] = []
        texts: list[Tokens | None] = []
        entries: dict[int, Entry] = {}
        first = 0
        for loader, part in parts:
            ids.append(self._ids_of(part, fetched.take(loader), stage, from_host=False))
            texts.append(self.sample_ids.texts)
            size = 0 if ids[-1] is None else len(ids[-1])
            for tensor, owners in rows_of(part, size, self.axes):
                entries[id(tensor)] = torch.where(owners < 0, owners, owners + first)
            first += size
        self.axes, self.readable = [entries.get(id(tensor)) for tensor in tensors_in(batch)], batch
        known = [text for text in texts if text is not None]
        if self.sample_ids.documents is None:
            self.sample_ids.texts = stack(known) if known and len(known) == len(texts) else None
        return concatenated(ids)

    def clear(self, stage: Stage) -> None:
        """Forgets batches that were fetched and not taken. A new pass over the loaders does so by itself."""
        self._fetched[stage].clear()

    def _ids_of(self, batch: Any, taken: FetchedBatch | None, stage: Stage, from_host: bool = True) -> Tensor | None:
        """The ids of one loader's batch, in the order of its rows."""
        fetched = Fetched() if taken is None else taken.fetched
        self.axes, self.readable = fetched.axes, batch
        index, moved = fetched.ids, None
        hosts = self.hosts[stage]
        can_read = from_host and self.sample_ids.segments is None
        host = hosts.of(batch, taken.host) if can_read and taken is not None else None
        inputs = None if taken is None else taken.inputs
        waits = host is None or not hosts.is_settled
        if taken is not None and index is not None and waits and not self.sample_ids.reads_key(batch):
            order = self._fetched[stage].order_in(batch, taken)
            if order.kind == "lost" and self.sample_ids.needs_index(batch):
                warn_once(self._warnings, REORDERED.format(key=self.sample_ids.key))
                return None
            index = None if order.kind == "lost" else index if order.rows is None else index[order.rows]
            moved, inputs = order.rows, None if order.kind == "lost" else inputs
            host = host if order.kind == "kept" else None
        self.readable, self.is_same = hosts.reading(batch, host)
        contents = None if taken is None else taken.contents
        if self.readable is batch and self.sample_ids.reads_key(batch) and not (taken and taken.tensors.are_in(batch)):
            inputs = contents = None  # keys may have been moved since, and these not with them
        batch = self.readable
        ids = self.sample_ids.of(batch, index, fetched)
        if self.sample_ids.documents is not None:
            self.axes = self.sample_ids.documents.axes(batch)
        if ids is not None and contents is not None:
            named = index if self.sample_ids.is_of_texts(batch) else ids
            if named is not None:
                self._check_contents(named, contents)
        is_packed = self.sample_ids.documents is not None
        self._ids_are_texts = self.sample_ids.source == "content" and (is_packed or self.sample_ids.is_of_texts(batch))
        if inputs is not None and ids is not None and not is_packed:
            self._note_inputs(ids, inputs, moved, stage)
        return ids

    def _note_inputs(self, ids: Tensor, inputs: Tensor, moved: Tensor | None, stage: Stage) -> None:
        """Notes the inputs of samples, as they were fetched; ``moved``: which of them is in each row now."""
        if stage == "train":
            self.overlap.note_training(inputs)
        else:
            self.overlap.note_controls(ids, inputs if moved is None else inputs[moved])

    def _merged_ids(self, batch: Any, taken: list[FetchedBatch | None]) -> Tensor | None:
        """The ids of a batch that a hook of the user's has made of those of several loaders."""
        index = concatenated([None if one is None else one.fetched.ids for one in taken])
        names = [one.fetched.names for one in taken if one is not None and one.fetched.names]
        merged = {id: key for some in names for id, key in some.items()}
        return self.sample_ids.of(batch, index, Fetched(names=merged or None))

    def _compares(self, fetched: Fetched | None) -> bool:
        """Whether the content of a batch is compared with what its ids had before."""
        by_index = self.sample_ids.source == "index" or self._ids_are_texts
        index = fetched.ids if fetched is not None and by_index else None
        return self.sample_ids.identity != "content" and self._contents.wants(index)

    def _check_contents(self, ids: Tensor, contents: Contents) -> None:
        if len(ids) != len(contents.rows):
            return
        found = self._contents.check(ids, contents)
        if found is not None:
            cure = {"index": ANEW, "key": NOT_UNIQUE}.get(self.sample_ids.source or "", TEXTS)
            warn_once(self._warnings, f"{found}. {cure.format(key=self.sample_ids.key)}")

    def _tag(self, loader: Any) -> object:
        if self.sample_ids.identity == "index" and not fetches_by_key(loader):
            raise self.sample_ids.index_error(f"got {describe(loader)}")
        return tag_loader(loader, self._on_fetch) if is_taggable(loader) else loader

    def _on_fetch(self, batches: object, batch: Any, fetched: Fetched | None) -> None:
        """Notes a batch that a loop fetched; the user may iterate over the same loader in between."""
        for stage, waiting in self._fetched.items():
            combined = self._combined_loader(stage)
            combined_pass = None if combined is None else combined._iterator
            for position, iterator in enumerate([] if combined_pass is None else combined_pass.iterators):
                if iterator is batches:
                    loader = getattr(combined_pass, "_iterator_idx", position)  # sequential mode: one at a time
                    with_contents = stage == "train" and self._compares(fetched)
                    inputs = self._inputs_of(stage, combined, None if fetched is None or loader else fetched.ids)
                    waiting.put(combined_pass, loader, batch, fetched, with_contents, inputs)

    def _inputs_of(self, stage: Stage, combined: object, rows: Tensor | None) -> Inputs | None:
        """Which inputs of the next batch are hashed, of ``rows`` of the first data set of ``combined``."""
        if self._ids_are_texts:
            return None
        if stage == "validate":
            return "named"
        if self._rows_of is None or self._rows_of() is not combined:
            self.overlap.forget_rows()
            self._rows_of = weakref.ref(combined)
        return "all" if self.overlap.wants_training(rows) else None

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
