"""The visits of samples between two writes to the ledger's table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._distributed import gather, is_first
from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.beside_training import BesideTraining
from lightning_memsink.callbacks.runtime.host_batches import HostBatches
from lightning_memsink.callbacks.runtime.host_copies import HostCopies
from lightning_memsink.callbacks.runtime.interrupts import interrupts_deferred
from lightning_memsink.detection.difficulty import Matching, write_features
from lightning_memsink.detection.family_features import FamilyRecord
from lightning_memsink.samples.content_check import ContentCheck
from lightning_memsink.samples.hashing import text_ids
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.rows_seen import RowsSeen
from lightning_memsink.samples.shared_texts import SharedTexts
from lightning_memsink.samples.tokens import Tokens, joined_by_width, stack
from lightning_memsink.samples.visits import Visit, Visits
from lightning_memsink.samples.windows import join_windows

CHANGED = (
    "A hook changed batches between the loader and the step, which it did not in the first steps. No losses are kept "
    "of those in which this was found. From now on batches are read where the step has them, which waits for the "
    "device."
)
MOST_TOKENS = 1 << 18
"""Of the texts between two writes: with more, the work on them would pile up before an evaluation."""
FIRST = 8
"""Batches before several processes know how many tokens all of them have."""


class VisitRecorder:
    """Collects the visits of this process, and records those of all processes in one table.

    Args:
        table: of the losses, with the names of samples.
        matching: of the samples' difficulty.
        hosts: how the batches that they were in are read.
    """

    def __init__(self, table: LossTable, matching: Matching, hosts: HostBatches) -> None:
        self.table, self.matching, self.hosts = table, matching, hosts
        self.families: FamilyRecord | None = None
        """Where near-duplicates are looked for."""
        self.content_check = ContentCheck()
        self.rows_seen = RowsSeen()
        self.shared_texts = SharedTexts()
        self.beside = BesideTraining()
        """What is done with texts; it is settled before features, counts or families are read."""
        table.complete = self.beside.settle
        self._visits: list[Visit] = []
        self._tokens = 0  # of visits since the last write
        self._most_batches = FIRST  # of each process between two writes
        self._copies = HostCopies()
        self._warnings = WarningCache()

    def __len__(self) -> int:
        return len(self._visits) + len(self._copies)

    def is_full(self, batches: int, alone: bool) -> bool:
        """Whether texts of many tokens wait to be recorded, ``batches`` after the last write.

        Several processes must agree on it: they go by the tokens of all of them at that write. One alone does not wait
        for a device that is behind.
        """
        if alone:
            return self._tokens >= MOST_TOKENS and self._copies.is_ready
        return batches >= self._most_batches

    def add(self, visit: Visit, is_same: Tensor | None = None) -> None:
        """Adds a batch, whose losses, counts and features may lie on a device. It only appends to lists.

        ``is_same``: bool ``[]``, whether the batch had the values by which its samples were known; without them it is
        left out.
        """
        self._tokens += _tokens_of(visit)

        def arrive(losses: Tensor, counted: Tensor | None, features: Tensor | None, is_same: Tensor | None) -> None:
            if self.hosts.admits(is_same):
                self._visits.append(visit.arrived(losses, counted, features))
            else:
                warn_once(self._warnings, CHANGED)

        self._copies.put(arrive, visit.losses, visit.counted, visit.features, is_same)

    def flush(self, drain: bool = True) -> None:
        """Records the visits of all processes in the order of steps, then ranks. Every process calls it.

        Losses on a device are waited for only to ``drain``; else those are recorded that the last call sent for.
        """
        self._tokens = 0
        self.beside.collect()
        if drain:
            self._copies.drain()
        else:
            self._copies.advance()
        gathered = gather((self._visits, self.table.names.take_new()))
        self._note_rate([one for one, _ in gathered])
        visits = sorted((visit for one, _ in gathered for visit in one), key=lambda visit: visit.step)
        with interrupts_deferred():
            self._visits = []
            for _, names in gathered:
                self.table.names.add_plain(names)
            if visits:
                self._record(visits)

    def _note_rate(self, of_processes: list[list[Visit]]) -> None:
        """``of_processes``: what all of them are about to record."""
        tokens, batches = sum(_tokens_of(visit) for one in of_processes for visit in one), max(map(len, of_processes))
        if batches:
            self._most_batches = max(1, MOST_TOKENS * batches // max(1, tokens))

    def has_any_before(self, epoch: int) -> bool:
        """Whether visits of an earlier epoch wait to be recorded."""
        self._copies.drain()
        return any(visit.epoch < epoch for visit in self._visits)

    def end_epoch(self) -> None:
        """Records what is left of an epoch, and says once which texts have several ids. Every process calls it."""
        self.flush()
        self.beside.put(self.shared_texts.said, self._say, 0)

    def state_dict(self) -> dict[str, Any]:
        """What was not flushed yet is saved as it is: a checkpoint more or less changes nothing of the run."""
        self._copies.drain()
        self.beside.settle()
        return {
            "visits": [asdict(visit) for visit in self._visits],
            "counts": self.matching.counts.state_dict(),
            "witnesses": self.content_check.state_dict(),
            "rows_seen": self.rows_seen.state_dict(),
            "names": self.table.names.state_dict(),
            "sources": self.table.source_names.state_dict(),
            **({} if self.families is None else {"families": self.families.state_dict()}),
        }

    def complete(self, state: dict[str, Any]) -> None:
        """Adds to the state of the first process, which alone is saved, what the others have not recorded yet.

        Every process calls it.
        """
        self._copies.drain()
        every = gather((self._visits, self.table.names.new()))
        visits = sorted((visit for visits, _ in every for visit in visits), key=lambda visit: visit.step)
        state["visits"] = [asdict(visit) for visit in visits]
        state["names"]["names"] += [name for _, names in every[1:] for name in names]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a `state_dict`; those of older versions have no names, or no visits."""
        self._copies.clear()
        self.beside.clear()
        waiting = state.get("visits", []) if is_first() else []  # to be counted once by all processes together
        self._visits = [*map(Visit.restored, waiting)]
        self.matching.counts.load_state_dict(state["counts"])
        self.content_check.load_state_dict(state["witnesses"])
        self.rows_seen.load_state_dict(state.get("rows_seen", {}))
        self.table.names.load_state_dict(state.get("names", {}))
        self.table.source_names.load_state_dict(state.get("sources", {}))
        if self.families is not None:
            self.families.load_state_dict(state.get("families", {}))

    def _record(self, visits: list[Visit]) -> None:
        joined = Visits.joined(visits)
        ids, losses, elements = joined.ids, joined.losses, joined.elements
        texts = [visit.tokens for visit in visits if visit.tokens is not None]
        known, is_part = len(self.table), None
        if joined.may_be_windows and joined.are_texts:
            at = self.table.rows_of(ids)
            windows = torch.cat([text_ids(tokens) for tokens in joined_by_width(texts)])
            losses, elements, is_part = join_windows(
                self.table, at, losses, elements, windows, joined.epochs, joined.steps
            )
        rows = self.table.record(ids, losses, joined.steps, elements, is_part)
        self.rows_seen.note(self.table, rows, joined, rows >= known)
        if joined.sources is not None:
            names = self.table.source_names
            self.table.write("source", *names.note(self.table.source[rows], rows, names.codes(joined.sources)))
        if not joined.are_texts:
            write_features(self.table, rows, rows >= known, None, joined.features)
            return
        self._describe(rows, rows >= known, ids, texts, joined.features)

    def _describe(self, rows: Tensor, new: Tensor, ids: Tensor, texts: list[Tokens], extra: Tensor | None) -> None:
        """Has the texts of several batches compared with what their ids had before, counted, and described, beside
        training; all ``[V]`` as `write_features` takes them."""
        exposures = self.table.exposures[rows]

        def run() -> tuple[str | None, Tensor]:
            changed = None
            for some, tokens in zip(ids.split([len(text.ids) for text in texts]), texts, strict=True):
                changed = self.content_check.check(some, tokens) or changed
            whole = joined_by_width(texts)
            sizes = [len(tokens.ids) for tokens in whole]
            for some, tokens in zip(ids.split(sizes), whole, strict=True):
                self.shared_texts.note(some, tokens)
                self.matching.count(tokens)
            parts = zip(whole, exposures.split(sizes), new.split(sizes), strict=True)
            features = torch.cat([self.matching.of_texts(*part) for part in parts])
            if self.families is not None:
                self.families.add(rows, stack(texts))
            return changed, features

        def then(found: tuple[str | None, Tensor]) -> None:
            changed, features = found
            self._say(changed)
            write_features(self.table, rows, new, features, extra)

        self.beside.put(run, then, sum(tokens.ids.numel() for tokens in texts))

    def _say(self, message: str | None) -> None:
        if message is not None:
            warn_once(self._warnings, message)


def _tokens_of(visit: Visit) -> int:
    return 0 if visit.tokens is None else visit.tokens.ids.numel()
