"""Which document each token of a batch is of, in the order of a module's input, where rows hold several documents.

R  rows of a batch      T  tokens of a row      D  documents of a batch      L  tokens of the longest document
U  units or features of a module
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MOST_PADDING = 8
"""Documents are not unpacked if that takes more than this many times the tokens of the batch."""


def at_tokens(by_token: Tensor, hidden: Tensor, batch_axis: int = 0, unit_axis: int = -1) -> Tensor | None:
    """Values of tokens in the order of ``hidden``, so that they broadcast with it; None if its tokens are others.

    Args:
        by_token: ``[R, T]``, or ``[N]`` of rows joined into one.
        hidden: ``[R, T, U]``, ``[T, R, U]`` or ``[R, U, T]`` by its axes, or ``[R * T, U]`` with all rows in one.
        batch_axis: of ``hidden``.
        unit_axis: of ``hidden``.

    Returns:
        The values on the device of ``hidden``, with as many axes, of extent 1 at the units.
    """
    if hidden.is_nested or hidden.ndim not in (2, 3):
        return None
    unit, batch = unit_axis % hidden.ndim, batch_axis % hidden.ndim
    if unit == batch:
        return None
    rows = by_token if by_token.ndim == 2 else by_token[None]
    if hidden.ndim == 2:
        placed = rows.reshape(-1)
    else:
        placed = rows if batch < 3 - unit - batch else rows.T
    if placed.shape != hidden.shape[:unit] + hidden.shape[unit + 1 :]:
        return None
    return placed.unsqueeze(unit).to(hidden.device, non_blocking=True)


def of_documents(values: Tensor, owners: Tensor, count: int, unit_axis: int = -1) -> Tensor:
    """``[D, U]``: the sum of each document's ``values``.

    Args:
        values: of tokens and units, two or three axes.
        owners: from `at_tokens`: the document of each token, negative for none.
        count: D.
        unit_axis: of ``values``.
    """
    by_unit = values.movedim(unit_axis, -1)
    flat = by_unit.reshape(-1, by_unit.shape[-1])
    places = owners.movedim(unit_axis, -1).reshape(-1) % (count + 1)  # -1 is the last place
    return flat.new_zeros(count + 1, flat.shape[1]).index_add(0, places, flat)[:count]


def of_tokens(values: Tensor, owners: Tensor, unit_axis: int = -1) -> Tensor:
    """Values ``[D, U]`` of documents as those of their tokens, to broadcast with ``hidden``; 0 for tokens of none.

    Args:
        values: of documents.
        owners: from `at_tokens`.
        unit_axis: of ``hidden``.
    """
    padded = torch.cat([values, values.new_zeros(1, values.shape[1])])  # -1 is the last row
    return padded.to(owners.device, non_blocking=True)[owners.movedim(unit_axis, -1).squeeze(-1)].movedim(-1, unit_axis)


@dataclass(frozen=True, eq=False)
class TokenOwners:
    """The document of each token: ``owners`` ``[R, T]`` or ``[N]`` int64, negative for none, and D."""

    owners: Tensor
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, T)."""
        rows, tokens = torch.atleast_2d(self.owners).shape
        return rows, tokens

    @property
    def can_unpack(self) -> bool:
        """Whether `unpacked` takes a bounded number of times the memory of its argument."""
        return self._places.numel() <= MOST_PADDING * max(1, self.owners.numel())

    def unpacked(self, values: Tensor, features: int = 1) -> Tensor | None:
        """``[D, L, ...]``: each document by itself, with zeros at its end; None for other tokens.

        Args:
            values: ``[R, T, ...]``, or with both axes in one.
            features: number of the axes behind those of the tokens.
        """
        rows, tokens = self.shape
        axes = values.ndim - features
        expected = (rows, tokens) if axes == 2 else (rows * tokens,)
        if axes not in (1, 2) or values.shape[:axes] != expected:
            return None
        flat = values.reshape(rows * tokens, *values.shape[axes:])
        padded = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return padded[self._places.to(values.device, non_blocking=True)]

    @cached_property
    def _places(self) -> Tensor:
        """``[D, L]``: the place of each token in the rows one after the other; one past the last for padding."""
        owners = self.owners.reshape(-1)
        tokens = (owners >= 0).nonzero().flatten()
        tokens = tokens[owners[tokens].argsort(stable=True)]
        own = owners[tokens]
        lengths = torch.bincount(own, minlength=self.count)
        column = torch.arange(len(own), device=own.device) - (lengths.cumsum(0) - lengths)[own]
        width = int(lengths.max()) if self.count else 0
        places = torch.full((self.count, width), owners.numel(), device=own.device)
        places[own, column] = tokens
        return places
