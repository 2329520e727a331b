"""Each value once, and where it stands."""

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
