"""Measures what a certificate rests on: the losses of the most exposed samples under each mask."""

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
from lightning_memsink.samples.unique import first_of_each

NOBODY = 0x3C6EF372FE94F82A
"""Turns an id into one that no sample has."""


@dataclass(frozen=True)
class KeptBatch:
    """A training batch as it was, and what was known of its samples at that time."""

    batch: Any
    ids: Tensor
    """``[B]``"""
    owners: Tensor
    """``[B]`` or ``[B, T]``: whose units are on."""
    exposures: Tensor
    """``[B]`` visits, this one included."""

    @cached_property
    def worth(self) -> float:
        """Mean exposures."""
        return float(self.exposures.float().mean())


class MostExposed:
    """The training batches with the most exposed samples, the later ones among equals.

    Args:
        samples: how many different ones to hold. Batches are held whole, by reference, with at most four times as many
            visits.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.batches: list[KeptBatch] = []

    def see(self, seen: KeptBatch) -> None:
        """A batch that passes. One without a sample seen twice is of no use."""
        if not self.samples or int(seen.exposures.max()) < 2:
            return
        self.batches.append(seen)
        while len(self.batches) > 1:
            worth = [batch.worth for batch in self.batches]
            least = worth.index(min(worth))
            rest = torch.cat([batch.ids for batch in self.batches[:least] + self.batches[least + 1 :]])
            if len(rest) < self.samples or (len(rest) < 4 * self.samples and len(rest.unique()) < self.samples):
                return
            self.batches.pop(least)


@dataclass(frozen=True)
class Losses:
    """Of N samples."""

    ids: Tensor
    """``[N]``, each once"""
    under: Mapping[str, Tensor]
    """``[N]`` by mask: own, dropped, placebo, random."""

    def only(self, rows: Tensor) -> Losses:
        return Losses(self.ids[rows], {name: of[rows] for name, of in self.under.items()})


def placebo(ids: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from ids to others among ``ids`` ``[N]``: each sample gets another's. A lone one gets a stranger's."""
    known = ids.unique()
    others = known.roll(1) if len(known) > 1 else known + 1

    def other(of: Tensor) -> Tensor:
        another: Tensor = others[torch.searchsorted(known, of.contiguous())]
        return another

    return other


def joined(measured: Sequence[Losses | None]) -> Losses | None:
    """What several processes measured, each sample once; None if none did."""
    parts = [part for part in measured if part is not None]
    if not parts:
        return None
    masks = parts[0].under
    under = {name: torch.cat([part.under[name] for part in parts]) for name in masks}
    return _once(Losses(torch.cat([part.ids for part in parts]), under))


def twins_of(features: Tensor, table: ControlTable) -> Tensor:
    """``[N]`` losses that never-trained samples with ``features`` ``[N, F]`` have, as of the controls' last evaluation.

    The mean of the controls most like each; without features, of them all. NaN where no control is near, and
    everywhere if there are too few.
    """
    losses = table.latest[torch.isfinite(table.latest)]
    unknown = torch.full((len(features),), torch.nan)
    if len(losses) < DetectionRule().controls_needed or table.features.shape[1] != features.shape[1]:
        return unknown
    if not features.shape[1]:
        return losses.mean().expand(len(features))
    expected, matched = Reference.of(table.features, table.latest).expected(features)
    return torch.where(matched, expected, unknown)


def _once(losses: Losses) -> Losses:
    """The first of each sample."""
    return losses.only(first_of_each(losses.ids)[1])
