"""A second look at samples that were trained on: in the mode, under the weights and at the step of the controls.

V  samples of a look      B  samples of a batch
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._distributed import gather
from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime import second_look_messages as messages
from lightning_memsink.callbacks.runtime.host_copies import HostCopies
from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.callbacks.runtime.second_look_batches import LookBatch, RowBatches
from lightning_memsink.callbacks.runtime.second_look_reservoir import Reservoir
from lightning_memsink.callbacks.runtime.second_look_steps import Measured, Mode, losses_of, traces_removed
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.samples.joined_looks import join_looks
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sample_ids import SampleIds

FAILURES = 3
"""Looks in a row that fail before no other is tried."""


class Look(NamedTuple):
    """What was measured: distinct ``rows`` ``[V]`` int64 of the loss table in any order, and their ``losses`` ``[V]``
    float32, NaN where the loss was not finite. ``seconds`` of this process; ``mode`` in which they were measured."""

    rows: Tensor
    losses: Tensor
    seconds: float = 0.0
    mode: Mode = "validation_step"


class SecondLook:
    """Measures samples again that were trained on. Training goes on as if it had not: see `measure`.

    Samples of map-style data are fetched again by the row that they came from, and their ids compared. Of streams, and
    of loaders whose batches can't be asked for by row, some whole batches are kept in host memory.

    Args:
        sample_ids: of the run.
        loader_ids: of the run.
        table: of the losses.
        capture: reads the steps' losses, as it does those of controls.
        samples: to keep of a stream, in each process.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        sample_ids: SampleIds,
        loader_ids: LoaderIds,
        table: LossTable,
        capture: EvaluationCapture,
        samples: int = 512,
        seed: int = 0,
    ) -> None:
        self.sample_ids = sample_ids
        self.loader_ids = loader_ids
        self.table = table
        self.capture = capture
        self.seed = seed
        self.refusal = ""
        """Why no look is possible, known after the first batch or look; empty if one is."""
        self.mode: Mode | None = None
        """Of the last look: another than was asked for where ``validation_step`` could not take a training batch."""
        self._by_row = RowBatches(sample_ids, table, loader_ids.hosts["train"])
        self._reservoir = Reservoir(samples, seed)
        self._is_by_row: bool | None = None  # unknown before the first batch whose samples are known
        self._size = 1  # samples of the largest batch so far
        self._failures = 0
        self._falls_back = False
        self._warnings = WarningCache()

    @property
    def keeps_batches(self) -> bool:
        """Whether looks are at batches kept of a stream, whatever rows are asked for."""
        return self._is_by_row is False

    def attach(self, trainer: Trainer) -> None:
        """When fit starts, once its model is complete."""
        module = trainer.lightning_module
        if not module.automatic_optimization and not is_overridden("validation_step", module):
            self.refusal = messages.MANUAL

    def detach(self) -> None:
        """Releases the batches that are kept."""
        self._reservoir.clear()

    def note(self, trainer: Trainer, batch: Any) -> None:
        """At the start of each training step, once the ledger's slot ``batch`` has its ids. It keeps a batch now and
        then, of streams; between them it neither copies nor waits."""
        current = Ledger.of(trainer).batch
        if current.ids is None or not len(current.ids):
            return
        self._size, self._by_row.source = max(self._size, len(current.ids)), self.sample_ids.source
        if self._is_by_row is None:
            self._is_by_row = not self._by_row.refusal(trainer) and self.sample_ids.rows is not None
        if not self._is_by_row and not self.refusal:
            ids, documents, axes = current.ids, current.documents, self.loader_ids.axes

            def described() -> LookBatch:  # reads documents on the host
                found = axes if documents is None else documents.axes(batch)
                return LookBatch(batch, ids, found, documents is not None)

            self._reservoir.offer(len(ids), described)

    def measure(self, trainer: Trainer, pl_module: LightningModule, rows: Tensor, mode: Mode) -> Look:
        """The losses that the samples in ``rows`` ``[V]`` of the table have now; every process calls it with the same.

        Each process measures its part of them, in as many forwards as the others, and all get the whole. Samples whose
        rows can't be fetched, or bring others, are left out, and one warning says how many. What a look fails by is
        said once; it returns an empty `Look`, and training goes on. Call it between two steps.

        Afterwards metrics, logs, random generators, modes, buffers and attributes of modules, samplers, workers, and
        what data sets hold are as before.
        """
        started = time.perf_counter()
        if self.refusal:
            return _nothing(mode)
        if mode == "validation_step" and self._falls_back:
            mode = "training_step"
        if mode != "validation_step" and not pl_module.automatic_optimization:
            self._fail(messages.MANUAL)
            return _nothing(mode)
        if self._is_by_row:
            rows = rows[self._by_row.are_known(rows)]
        known = dict(vars(self.sample_ids))  # of the batch that was trained on last
        try:
            with torch.inference_mode(False):
                look, reason = self._look(trainer, pl_module, rows, mode)
        finally:
            vars(self.sample_ids).update(known)
            self.capture.abandon()
        if look is None:
            self._fail(reason)
            return _nothing(mode)
        self._failures, self.mode = 0, look.mode
        return look._replace(seconds=time.perf_counter() - started)

    def _fail(self, reason: str) -> None:
        self._failures += 1
        if self._failures >= FAILURES:
            self.refusal = reason
        warn_once(self._warnings, messages.failed(reason), key="failed")

    def _look(self, trainer: Trainer, pl_module: LightningModule, rows: Tensor, mode: Mode) -> tuple[Look | None, str]:
        """A look at ``rows``; or None, and the reason. No error leaves it: other processes wait for this one."""
        with traces_removed(trainer, pl_module, mode):
            pass_ = _Pass(self, trainer, pl_module, rows)
            reason = pass_.first(mode)
            if reason and mode == "validation_step" and pl_module.automatic_optimization:
                self._falls_back = not pass_.first("training_step")
                if self._falls_back:
                    warn_once(self._warnings, messages.falls_back(reason), key="falls back")
                    mode, reason = "training_step", ""
            if not reason:
                pass_.others(mode)
        every = gather(([] if reason else pass_.measured, reason or pass_.failure))
        parts = [part for some, _ in every for part in some]
        reasons = [reason for _, reason in every if reason]
        if not parts:
            return (None, (*reasons, messages.NO_BATCH)[0]) if reasons or len(rows) else (_nothing(mode), "")
        found = Measured(*(torch.cat(each) for each in zip(*parts, strict=True)))
        look = Look(*join_looks(*found, self._by_row.windows(found.ids)), mode=mode)
        if self._is_by_row and len(look.rows) < len(rows):
            missed = len(rows) - len(look.rows)
            warn_once(self._warnings, messages.left_out(missed, len(rows), reasons), key="left out")
        return look, ""


class _Pass:
    """One pass over the batches of a look, in one process."""

    def __init__(self, look: SecondLook, trainer: Trainer, pl_module: LightningModule, rows: Tensor) -> None:
        self.look, self.trainer, self.module = look, trainer, pl_module
        self.measured: list[Measured] = []
        """Of each batch, with rows of the table as ids."""
        self.failure = ""
        self._copies = HostCopies()
        self._asked = torch.zeros(len(look.table), dtype=torch.bool)
        self._asked[rows] = True
        self._batches = self._source(rows)
        self._first = self._next()
        self._count = 0

    def first(self, mode: Mode) -> str:
        """Measures the first batch; why that failed in any process, or nothing."""
        self.measured.clear()
        reason = "" if self._first is None else self._measure(self._first, mode)
        self._copies.drain()
        return next(filter(None, gather(reason)), "")

    def others(self, mode: Mode) -> None:
        """Measures all others. A failure ends no pass: other processes may wait in a step of theirs."""
        while (batch := self._next()) is not None:
            self.failure = self._measure(batch, mode) or self.failure
        self._copies.drain()

    def _source(self, rows: Tensor) -> Iterator[LookBatch]:
        """The batches of this process, as many as in each other one."""
        look, trainer, world = self.look, self.trainer, self.trainer.world_size
        if look._is_by_row is False:
            device = trainer.strategy.root_device
            kept = look._reservoir
            return kept.batches(device, len(kept) if world == 1 else min(gather(len(kept))))
        own = rows[trainer.global_rank :: world]
        own = own if len(own) else rows[:1]
        seed = hash((look.seed, trainer.global_step, trainer.global_rank)) & 0x7FFFFFFF
        found = look._by_row.batches(trainer, self.module, own, look._size, seed)
        return found if world == 1 else self._evened(found)

    def _evened(self, found: Iterator[LookBatch]) -> Iterator[LookBatch]:
        """The batches of this process, some of them again so that all processes have as many."""
        listed: list[LookBatch] = []
        try:
            listed += found
        except Exception as error:
            self.failure = messages.of_error(error)
        counts = gather(len(listed))
        most = max(counts) if min(counts) else 0
        return iter([listed[n % len(listed)] for n in range(most)])

    def _next(self) -> LookBatch | None:
        try:
            batch = next(self._batches, None)
        except Exception as error:  # of the user's data set or hooks, or of a worker
            self.failure, batch = messages.of_error(error), None
        failure = self.look._by_row.failure
        if failure is not None and not self.failure:
            self.failure = messages.of_error(failure)
        return batch

    def _measure(self, batch: LookBatch, mode: Mode) -> str:
        """Adds the losses of a batch; why there are none, or nothing."""
        self._count += 1
        found = losses_of(self.trainer, self.module, self.look.capture, batch, self._count - 1, mode)
        if isinstance(found, str):
            return found
        self._copies.put(partial(self._add, found), found.losses, found.elements, batch.is_same)
        return ""

    def _add(self, found: Measured, losses: Tensor, elements: Tensor, is_same: Tensor | None) -> None:
        if not self.look.loader_ids.hosts["train"].admits(is_same):
            return
        rows = self.look.table.index.find(found.ids)
        known = rows >= 0
        known[known.clone()] = self._asked[rows[known]] | self.look.keeps_batches
        losses = torch.where(losses.isfinite(), losses, torch.nan)
        if bool((elements != elements.round()).any()):  # weights that are no numbers of tokens
            elements = torch.ones_like(losses)
        self.measured.append(Measured(*(part[known] for part in (rows, losses, elements, found.rows))))


def _nothing(mode: Mode) -> Look:
    return Look(torch.zeros(0, dtype=torch.int64), torch.zeros(0), mode=mode)
