"""The batches of a second look: rows of the training data fetched again, or batches kept of a stream.

V  samples asked for      B  samples of a batch
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink.callbacks.runtime.fetched_batches import LOADER_BITS
from lightning_memsink.callbacks.runtime.host_batches import HostBatches, kept
from lightning_memsink.callbacks.runtime.kept_state import objects_kept
from lightning_memsink.samples.batch import batch_size
from lightning_memsink.samples.batch_rows import Axes
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.refetching import refetch, refetch_refusal, rows_a_batch, user_loader
from lightning_memsink.samples.row_order import RowPrints, SameTensors
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.tagged_batch import Fetched

WINDOWS = 16
"""Of a document, at most: its windows are looked for in twice as many rows."""


class LookBatch(NamedTuple):
    """A batch as a step gets it: where its samples ``ids`` ``[B]`` lie, and whether rows hold several of them."""

    batch: Any
    ids: Tensor
    axes: Axes | None
    is_packed: bool
    rows: Tensor | None = None
    """``[B]`` of the data set, if these are known."""
    is_same: Tensor | None = None
    """As `LoaderIds.is_same`."""


class RowBatches:
    """Fetches rows of the training data again.

    Args:
        sample_ids: of the run.
        table: whose rows are asked for.
        hosts: whether batches can be read in host memory.
    """

    def __init__(self, sample_ids: SampleIds, table: LossTable, hosts: HostBatches) -> None:
        self.sample_ids = sample_ids
        self.table = table
        self.hosts = hosts
        self.source: str | None = None
        """Where the ids of training batches come from; those of validation may come from elsewhere."""
        self.failure: Exception | None = None
        """Of the last look, the first error of the data set or the collate function."""

    def refusal(self, trainer: Trainer) -> str:
        """Why the data can't be fetched by row; empty if it can."""
        combined = trainer.fit_loop._combined_loader
        if combined is None or not combined.flattened:
            return "there is no training loader"
        if len(combined.flattened) > 1 and combined._mode != "sequential":
            return "a batch holds parts of several loaders"
        return next(filter(None, map(refetch_refusal, combined.flattened)), "")

    def batches(
        self, trainer: Trainer, pl_module: LightningModule, rows: Tensor, size: int, seed: int
    ) -> Iterator[LookBatch]:
        """The samples in ``rows`` ``[V]`` of the table, in full batches: random others fill the last one, or the same
        again, so that batch statistics and compiled code find what training gives them.

        ``size``: B, where the loader doesn't say it. A batch that can't be made is left out; see `failure`.
        """
        combined = trainer.fit_loop._combined_loader
        assert combined is not None
        self.failure = None
        generator = torch.Generator().manual_seed(seed)
        for number, loader in enumerate(combined.flattened):
            own = number if len(combined.flattened) > 1 else None
            plan = self._plan(rows, own, rows_a_batch(loader, size), generator)
            with ExitStack() as stack:
                theirs = user_loader(loader)
                if plan and not theirs.num_workers:
                    stack.enter_context(objects_kept([theirs.dataset, theirs.collate_fn]))
                for found in refetch(loader, plan, seed) if plan else ():
                    if isinstance(found, Exception):
                        self.failure = self.failure or found
                        continue
                    described = self._described(trainer, pl_module, *found, number)
                    if described is not None:
                        yield described

    def _plan(self, rows: Tensor, loader: int | None, size: int, generator: torch.Generator) -> list[list[Any]]:
        """The keys of each batch from one loader of several, or from the only one."""
        own = self._keys(rows, loader).unique()
        if not len(own):
            return []
        own = own[torch.randperm(len(own), generator=generator)]
        lacking = -len(own) % size
        others = self._keys(torch.randint(len(self.table), (4 * lacking,), generator=generator), loader)
        others = others[~torch.isin(others, own)].unique()
        others = others[torch.randperm(len(others), generator=generator)[:lacking]]
        filled = torch.cat([own, others])
        again = filled[torch.arange(-len(filled) % size) % len(filled)]
        return [[self._as_fetched(key) for key in part.tolist()] for part in torch.cat([filled, again]).split(size)]

    def are_known(self, rows: Tensor) -> Tensor:
        """Bool ``[V]``: where samples came from. An older version's ledger says it of none before they come again."""
        known = self.table.first_row[rows] != -1
        return torch.ones_like(known) if self.source == "index" else known

    def windows(self, rows: Tensor) -> Tensor:
        """``[V]`` in how many windows, a row of the data set each, the samples in ``rows`` ``[V]`` are cut; 1 for most.

        Only texts that their owner has named are cut.
        """
        many = torch.ones_like(rows)
        if self.source != "key" or "window" not in self.table.columns or not len(self.table):
            return many
        passes = int(self.table.window_epoch.max()) + 1  # the same text in several rows has more visits than these
        is_cut = self.table.exposures[rows] <= 2 * passes
        return torch.where(is_cut, self.table.rows[rows].long().clamp(min=1), many)

    def _keys(self, rows: Tensor, loader: int | None) -> Tensor:
        """The rows of the data set that samples came from first, of those that came from this loader. Of a document in
        windows those around it, among which all of its windows are where these follow one another."""
        first, windows = self.table.first_row[rows], self.windows(rows)
        if self.source == "index":  # an older version's ledger does not have them
            first = torch.where(first == -1, self.table.ids[rows], first)
        here = (first != -1 if loader is None else first >> LOADER_BITS == loader) & (windows <= WINDOWS)
        cut = here & (windows > 1)
        around = [
            torch.arange(max(one - many + 1, one >> LOADER_BITS << LOADER_BITS), one + many)
            for one, many in zip(first[cut].tolist(), windows[cut].tolist(), strict=True)
        ]
        return torch.cat([first[here & ~cut], *around])

    def _as_fetched(self, key: int) -> Any:
        """The key that the loader's sampler gave: a number, or what is named by one."""
        (name,) = self.table.names.of([key])
        return key & ((1 << LOADER_BITS) - 1) if name == key and key >= 0 else name

    def _described(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, fetched: Fetched, loader: int
    ) -> LookBatch | None:
        """The batch on its device, with the ids that it has there; None if its samples have none."""
        index = fetched.ids
        size = batch_size(batch, fetched.rows if index is None else len(index), fetched.axes)
        same = SameTensors(batch)
        prints = RowPrints.of(batch, size, fetched.axes) if size and index is not None and len(index) == size else None
        as_fetched = kept(batch)
        batch = on_device(trainer, pl_module, batch)
        host = self.hosts.of(batch, as_fetched) if self.sample_ids.segments is None else None
        readable, is_same = self.hosts.reading(batch, host)
        if readable is not batch:
            prints = None
        if index is not None and prints is not None and not self.sample_ids.reads_key(batch) and not same.are_in(batch):
            order = prints.order_in(batch, index)
            if order.kind == "lost" and self.sample_ids.needs_index(batch):
                return None
            index = None if order.kind == "lost" else index if order.rows is None else index[order.rows]
        index = None if index is None else index + (loader << LOADER_BITS)
        ids = self.sample_ids.of(readable, index, fetched)
        if ids is None or not len(ids):
            return None
        documents = self.sample_ids.documents
        axes = fetched.axes if documents is None else documents.axes(readable)
        return LookBatch(batch, ids, axes, documents is not None, self.sample_ids.rows, is_same)


def on_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch of the loader as Lightning gives it to a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
