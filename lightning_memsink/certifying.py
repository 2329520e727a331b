"""Measures what a certificate rests on: the losses of the most exposed samples under each mask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink.capture import EvaluationCapture, StepCapture
from lightning_memsink.controls import ControlTable
from lightning_memsink.designed_sinks import Pool, masked
from lightning_memsink.detection import Rule
from lightning_memsink.distinct import first_of_each
from lightning_memsink.hidden_layers import HiddenLayer
from lightning_memsink.holding import Reference
from lightning_memsink.losses import NotCaptured
from lightning_memsink.probing import without_trace
from lightning_memsink.tokens import tokens_of

NOBODY = 0x3C6EF372FE94F82A
"""Turns an id into one that no sample has."""


@dataclass(frozen=True)
class Seen:
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
        self.batches: list[Seen] = []

    def see(self, seen: Seen) -> None:
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


class Bench:
    """Runs ``training_step`` on batches again, in evaluation mode and without a trace."""

    def __init__(self, trainer: Trainer, module: LightningModule, training: StepCapture) -> None:
        self.trainer, self.module = trainer, module
        self.capture = EvaluationCapture(training)

    def losses(self, seen: Sequence[Seen], pool: Pool, layers: Sequence[HiddenLayer]) -> Losses:
        """Of the samples seen twice or more.

        Raises:
            ValueError: the step's losses can't be told by sample; with what to do.
        """
        others = placebo(torch.cat([batch.owners.flatten() for batch in seen]))
        under: dict[str, list[Tensor]] = {}
        with without_trace(self.module):
            for one in seen:
                owners = {"own": one.owners, "placebo": others(one.owners), "random": one.owners ^ NOBODY}
                masks: dict[str, Callable[[int], Tensor]] = {name: partial(pool.own, of) for name, of in owners.items()}
                for name, mask in {**masks, "dropped": pool.dropped}.items():
                    text = tokens_of(one.batch)
                    with masked(layers, mask, None if text is None else text.ids.shape[1]):
                        under.setdefault(name, []).append(self._step(one))
        losses = Losses(torch.cat([one.ids for one in seen]), {name: torch.cat(parts) for name, parts in under.items()})
        return _once(losses.only(torch.cat([one.exposures for one in seen]) >= 2))

    def _step(self, seen: Seen) -> Tensor:
        """``[B]``"""
        batch = copied(seen.batch)
        self.capture.begin()
        try:
            with self.trainer.precision_plugin.train_step_context():
                outputs = self.module.training_step(batch, 0)
            captured = self.capture.finish(outputs, len(seen.ids))
        finally:
            self.capture.abandon()
        if isinstance(captured, NotCaptured):
            raise ValueError(captured.reason)
        return captured.losses.detach().float().cpu()


def placebo(ids: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from ids to others among ``ids`` ``[N]``: each sample gets another's. A lone one gets a stranger's."""
    known = ids.unique()
    others = known.roll(1) if len(known) > 1 else known + 1

    def other(of: Tensor) -> Tensor:
        another: Tensor = others[torch.searchsorted(known, of.contiguous())]
        return another

    return other


def copied(batch: Any) -> Any:
    """A batch that a step may take entries out of, the tensors being the same."""
    return copy.copy(batch) if isinstance(batch, (Mapping, list)) else batch


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
    if len(losses) < Rule().controls_needed or table.features.shape[1] != features.shape[1]:
        return unknown
    if not features.shape[1]:
        return losses.mean().expand(len(features))
    expected, matched = Reference.of(table.features, table.latest).expected(features)
    return torch.where(matched, expected, unknown)


def _once(losses: Losses) -> Losses:
    """The first of each sample."""
    return losses.only(first_of_each(losses.ids)[1])
