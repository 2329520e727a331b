"""What a certificate is measured on: the most exposed training samples, and their losses under each mask.

N  samples      B  samples in a batch      T  tokens of a sample      F  matching features
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.mitigation.hold import Reference
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.documents import Documents
from lightning_memsink.samples.unique import first_of_each

UNUSED_ID_BITS = 0x3C6EF372FE94F82A
"""An id xor these bits is an id that no sample has."""


@dataclass(frozen=True)
class KeptBatch:
    """A training batch as it was before its step, and the exposures of its samples at that time."""

    batch: Any
    ids: Tensor
    """``[B]``"""
    owners: Tensor
    """``[B]`` or ``[B, T]``: the ids whose pool units are on."""
    exposures: Tensor
    """``[B]`` visits, this one included."""
    documents: Documents | None = None
    """Where rows hold several documents, which are the samples then."""

    @cached_property
    def mean_exposures(self) -> float:
        return float(self.exposures.float().mean())


class MostExposed:
    """The training batches with the most exposed samples; of equally exposed batches, the later ones.

    Args:
        samples: number of different samples to keep at least. Whole batches are kept, by reference, with at most four
            times as many visits.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.batches: list[KeptBatch] = []

    def add(self, new: KeptBatch) -> None:
        """Keeps ``new``, and drops the least exposed batches that are not needed. A batch without any sample visited
        twice or more is not kept."""
        if not self.samples or int(new.exposures.max()) < 2:
            return
        self.batches.append(new)
        while len(self.batches) > 1:
            exposures = [batch.mean_exposures for batch in self.batches]
            least = exposures.index(min(exposures))
            rest = torch.cat([batch.ids for batch in self.batches[:least] + self.batches[least + 1 :]])
            if len(rest) < self.samples or (len(rest) < 4 * self.samples and len(rest.unique()) < self.samples):
                return
            self.batches.pop(least)


@dataclass(frozen=True)
class LossesByMask:
    """Losses of N samples under each mask."""

    ids: Tensor
    """``[N]``"""
    by_mask: Mapping[str, Tensor]
    """``[N]`` losses in nats by the mask's name: own, dropped, placebo, random."""

    def select(self, rows: Tensor) -> LossesByMask:
        """The losses of ``rows``, a bool mask ``[N]`` or indices."""
        return LossesByMask(self.ids[rows], {name: losses[rows] for name, losses in self.by_mask.items()})

    def deduplicated(self) -> LossesByMask:
        """Each sample once: its first row, in ascending order of ids."""
        return self.select(first_of_each(self.ids)[1])


def placebo(ids: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that maps each of ``ids`` ``[N]`` to another of them; a single id to one that is not among them."""
    known = ids.unique()
    others = known.roll(1) if len(known) > 1 else known + 1

    def other(ids: Tensor) -> Tensor:
        another: Tensor = others[torch.searchsorted(known, ids.contiguous())]
        return another

    return other


def merge(measured: Sequence[LossesByMask | None]) -> LossesByMask | None:
    """The losses that several processes measured, each sample once; None if no process has any."""
    parts = [part for part in measured if part is not None]
    if not parts:
        return None
    by_mask = {name: torch.cat([part.by_mask[name] for part in parts]) for name in parts[0].by_mask}
    return LossesByMask(torch.cat([part.ids for part in parts]), by_mask).deduplicated()


def twin_losses(features: Tensor, table: ControlTable) -> Tensor:
    """``[N]`` losses, in nats, expected of never-trained samples with ``features`` ``[N, F]``, at the controls' last
    evaluation.

    The mean loss of the nearest controls; without features (F = 0), of all controls. NaN where no control is near, and
    everywhere if there are too few controls.
    """
    losses = table.latest[torch.isfinite(table.latest)]
    unknown = torch.full((len(features),), torch.nan)
    if len(losses) < DetectionRule().controls_needed or table.features.shape[1] != features.shape[1]:
        return unknown
    if not features.shape[1]:
        return losses.mean().expand(len(features))
    expected, matched = Reference.of(table.features, table.latest).expected(features)
    return torch.where(matched, expected, unknown)
