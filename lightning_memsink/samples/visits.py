"""Batches between the training step and the loss table: ids, losses, text and features of their samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memsink.samples.tokens import Tokens, stack, tokens_of


class DescribedBatch(NamedTuple):
    """The samples of a batch: ``ids`` ``[B]``, and what they are matched on: text, features ``[B, F]``."""

    ids: Tensor
    tokens: Tokens | None
    features: Tensor | None

    @classmethod
    def of(
        cls,
        batch: Any,
        ids: Tensor,
        features: Callable[[Any], Tensor] | None,
        axes: Sequence[int] | None = None,
    ) -> DescribedBatch:
        """``features``: the user's, of a batch. ``axes``: where samples lie, as `samples.batch_rows.rows_of` takes."""
        text = tokens_of(batch, axes)
        tokens = None if text is None or len(text.ids) != len(ids) else Tokens(text.ids.cpu(), text.mask.cpu())
        extra = None if features is None else features(batch).detach().float().cpu().reshape(len(ids), -1)
        return cls(ids, tokens, extra)


@dataclass(frozen=True)
class Visit:
    """A batch that was trained on: its samples, ``losses`` ``[B]`` (NaN where none is known), and the optimizer steps
    before it."""

    ids: Tensor
    losses: Tensor
    step: int
    tokens: Tokens | None
    features: Tensor | None

    @classmethod
    def restored(cls, plain: dict[str, Any]) -> Visit:
        """From what ``dataclasses.asdict`` made of one."""
        tokens = plain["tokens"]
        return cls(**{**plain, "tokens": None if tokens is None else Tokens(**tokens)})


class Visits(NamedTuple):
    """V samples of several batches: ids, losses, steps and elements of each loss ``[V]``; text and features of all, or
    of none."""

    ids: Tensor
    losses: Tensor
    steps: Tensor
    elements: Tensor
    tokens: Tokens | None
    features: Tensor | None

    @classmethod
    def joined(cls, visits: Sequence[Visit]) -> Visits:
        ids = torch.cat([visit.ids for visit in visits])
        tokens = stack(visit.tokens for visit in visits)
        extra = [visit.features for visit in visits if visit.features is not None]
        return cls(
            ids,
            torch.cat([visit.losses for visit in visits]),
            torch.cat([torch.full((len(visit.ids),), visit.step, dtype=torch.int32) for visit in visits]),
            torch.ones(len(ids)) if tokens is None else tokens.mask.sum(1),
            tokens,
            torch.cat(extra) if len(extra) == len(visits) else None,
        )
