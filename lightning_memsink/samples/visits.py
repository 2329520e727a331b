"""Batches between the training step and the loss table: ids, losses, text and features of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memsink.samples.batch_rows import Axes
from lightning_memsink.samples.sources import Labels
from lightning_memsink.samples.tokens import Tokens, tokens_of


class DescribedBatch(NamedTuple):
    """The samples of a batch: ``ids`` ``[B]``, and what they are matched on: text, features ``[B, F]``; ``rows``
    ``[B]`` of the data set that they came from, and labels of their ``sources``, if these are known."""

    ids: Tensor
    tokens: Tokens | None
    features: Tensor | None
    rows: Tensor | None = None
    sources: Labels | None = None

    @classmethod
    def of(
        cls,
        batch: Any,
        ids: Tensor,
        features: Tensor | None,
        axes: Axes | None = None,
        texts: Tokens | None = None,
        rows: Tensor | None = None,
    ) -> DescribedBatch:
        """The samples ``ids`` of a batch.

        Args:
            batch: what training_step gets.
            ids: ``[B]``.
            features: the user's, one row a sample; they stay on their device.
            axes: where samples lie, as `samples.batch_rows.rows_of` takes.
            texts: ``[B, L]`` of documents, if these are its samples.
            rows: ``[B]`` of the data set.
        """
        tokens = tokens_of(batch, axes) if texts is None else texts
        if tokens is not None:
            tokens = None if len(tokens.ids) != len(ids) else Tokens(tokens.ids.cpu(), tokens.mask.cpu())
        extra = None if features is None else features.detach().float().reshape(len(ids), -1)
        return cls(ids, tokens, extra, rows)


@dataclass(frozen=True)
class Visit:
    """A batch that was trained on: its samples, ``losses`` ``[B]`` (NaN where none is known), and the optimizer steps
    before it."""

    ids: Tensor
    losses: Tensor
    step: int
    tokens: Tokens | None
    features: Tensor | None
    epoch: int = 0
    rows: Tensor | None = None
    """``[B]`` rows of the data set that the samples came from."""
    counted: Tensor | None = None
    """``[B]`` number of elements in each loss; None where it is not known, and text says it."""
    sources: Labels | None = None
    """B labels of the samples' sources. Not codes: each process would give others."""
    may_be_windows: bool = False
    """Whether samples of one id may be parts of one document: their owner has named them."""

    @classmethod
    def of(
        cls,
        samples: DescribedBatch,
        losses: Tensor,
        step: int,
        epoch: int,
        counted: Tensor | None = None,
        may_be_windows: bool = False,
    ) -> Visit:
        ids, tokens, features, rows, sources = samples
        return cls(ids, losses, step, tokens, features, epoch, rows, counted, sources, may_be_windows)

    def arrived(self, losses: Tensor, counted: Tensor | None, features: Tensor | None) -> Visit:
        """The same visit, with what lay on a device in host memory. ``counted``: of the losses, as captured."""
        counted = None if self.tokens is None else elements_of_texts(self.tokens, counted)
        return replace(self, losses=losses, counted=counted, features=features)

    @classmethod
    def restored(cls, plain: dict[str, Any]) -> Visit:
        """From what ``dataclasses.asdict`` made of one."""
        tokens = plain["tokens"]
        return cls(**{**plain, "tokens": None if tokens is None else Tokens(**tokens)})


class Visits(NamedTuple):
    """V samples of several batches: ids, losses, steps, epochs and elements of each loss ``[V]``; rows of the data set
    ``[V]``, -1 where unknown; whether all are texts; features of all, or of none; V labels of sources if there is any.
    """

    ids: Tensor
    losses: Tensor
    steps: Tensor
    elements: Tensor
    are_texts: bool
    features: Tensor | None
    epochs: Tensor
    rows: Tensor
    may_be_windows: bool
    sources: Labels | None

    @classmethod
    def joined(cls, visits: Sequence[Visit]) -> Visits:
        ids = torch.cat([visit.ids for visit in visits])
        extra = [visit.features for visit in visits if visit.features is not None]
        return cls(
            ids,
            torch.cat([visit.losses for visit in visits]),
            _spread([visit.step for visit in visits], visits),
            torch.cat([_elements(visit) for visit in visits]),
            all(visit.tokens is not None for visit in visits),
            torch.cat(extra) if len(extra) == len(visits) else None,
            _spread([visit.epoch for visit in visits], visits),
            torch.cat([torch.full_like(visit.ids, -1) if visit.rows is None else visit.rows for visit in visits]),
            any(visit.may_be_windows for visit in visits),
            _labels(visits),
        )


def elements_of_texts(tokens: Tokens, counted: Tensor | None) -> Tensor:
    """``[B]`` how many tokens each loss of a text is of. ``counted``: the weights of its tokens as captured; those that
    are no numbers of tokens are not taken for such."""
    are_numbers = counted is not None and bool((counted == counted.round()).all())
    return counted.float() if counted is not None and are_numbers else tokens.mask.sum(1).float()


def _labels(visits: Sequence[Visit]) -> Labels | None:
    if all(visit.sources is None for visit in visits):
        return None
    return [label for visit in visits for label in visit.sources or [None] * len(visit.ids)]


def _elements(visit: Visit) -> Tensor:
    if visit.counted is not None:
        return visit.counted.float()
    return torch.ones(len(visit.ids)) if visit.tokens is None else visit.tokens.mask.sum(1).float()


def _spread(numbers: Sequence[int], visits: Sequence[Visit]) -> Tensor:
    """``[V]`` int32: the number of each visit, for each of its samples."""
    return torch.cat(
        [
            torch.full((len(visit.ids),), number, dtype=torch.int32)
            for number, visit in zip(numbers, visits, strict=True)
        ]
    )
