"""Distinct values of a tensor, and their positions."""

from __future__ import annotations

import torch
from torch import Tensor


def first_of_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ``values`` ``[V]`` in ascending order, and the position of the first of each.

    >>> first_of_each(torch.tensor([7, 3, 7]))
    (tensor([3, 7]), tensor([1, 0]))
    """
    distinct, inverse = torch.unique(values, return_inverse=True)
    beyond = torch.full(distinct.shape, len(values))
    return distinct, beyond.scatter_reduce_(0, inverse, torch.arange(len(values)), "amin")


def last_of_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the position of the last of each."""
    distinct, inverse = torch.unique(values, return_inverse=True)
    before = torch.full(distinct.shape, -1)
    return distinct, before.scatter_reduce_(0, inverse, torch.arange(len(values)), "amax")


def distinct_rows(sequences: Tensor) -> Tensor:
    """``[N, T]`` without repeated rows, in order of first occurrence."""
    first = dict.fromkeys(map(tuple, sequences.tolist()))
    return torch.tensor(list(first), dtype=torch.int64).reshape(-1, sequences.shape[1])


def without(sequences: Tensor, others: Tensor) -> Tensor:
    """The rows of ``[N, T]`` that are no row of ``others`` ``[M, T]``."""
    known = set(map(tuple, others.tolist()))
    return sequences[[row not in known for row in map(tuple, sequences.tolist())]]
