"""The nearest of a few thousand controls, for each of many samples: exact, and without a matrix of all pairs.

N  points      M  rows among which they have neighbours      F  features      k  neighbours
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_memsink.blocks import in_blocks

Floats = NDArray[np.float32]


class Neighbours:
    """Finds the ``k`` nearest rows of ``among`` ``[M, F]`` (all of them, if there are fewer).

    The k-th smallest of the groups' smallest distances is no less than the k-th smallest distance: k groups hold one as
    small. So what lies farther is out, and the few that are left, hardly more than k, are sorted.
    """

    def __init__(self, among: Tensor, k: int) -> None:
        self.k = min(k, len(among))
        self._centre = among.mean(0)  # products of small numbers lose less
        centred = among - self._centre
        self._squares, self._factors = centred.square().sum(1), (-2 * centred).T.contiguous()

    def of(self, points: Tensor, own: slice | None = None) -> tuple[Tensor, Tensor]:
        """Indices and squared distances ``[N, k]``, nearest first; the latter to single precision of the coordinates.

        ``own``: the rows of ``among`` that the points themselves are, and nobody is its own neighbour.
        """
        points = points - self._centre
        apart = torch.addmm(self._squares, points, self._factors)  # squared distance but for the point's own square
        if own is not None:
            apart[torch.arange(len(points)), torch.arange(own.start, own.stop)] = torch.inf
        order, ranked = self._smallest(apart)
        return order, (ranked + points.square().sum(1, keepdim=True)).clamp_(min=0)

    def _smallest(self, apart: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and values ``[N, k]`` of the smallest of each row of ``apart`` ``[N, M]``."""
        values = apart.numpy()
        least = _least_of_groups(values, 4 * self.k)
        bound = np.partition(least, self.k - 1, 1)[:, self.k - 1, None]
        left = np.flatnonzero(values <= bound)
        row, column = np.divmod(left, values.shape[1])
        many = np.bincount(row, minlength=len(values))
        place = np.arange(len(left)) - np.repeat(many.cumsum() - many, many)
        # A value in double precision has 29 bits to spare: they carry its column through the sort.
        keys = values.ravel()[left].astype(np.float64).view(np.int64) | column
        ragged = np.full((len(values), max(self.k, many.max(initial=0))), np.inf)
        ragged.view(np.int64)[row, place] = keys
        ragged.sort(1)
        smallest = ragged[:, : self.k].copy()
        order = smallest.view(np.int64) & ((1 << values.shape[1].bit_length()) - 1)
        return torch.from_numpy(order), torch.from_numpy(smallest.astype(np.float32))


def _least_of_groups(values: Floats, groups: int) -> Floats:
    """The smallest of each group of columns of ``values`` ``[N, M]``, folded in halves to about ``groups`` of them."""
    single = []
    while values.shape[1] > groups:
        half = values.shape[1] // 2
        single.append(values[:, 2 * half :])
        values = np.minimum(values[:, :half], values[:, half : 2 * half])
    return np.concatenate([values, *single], 1)


def nearest(points: Tensor, among: Tensor, k: int, *, fellows: bool = False) -> tuple[Tensor, Tensor]:
    """Indices ``[N, k]`` of the nearest rows of ``among``, nearest first, and the mean distance ``[N]`` to them.

    ``fellows``: the points are ``among`` themselves, and nobody is its own neighbour.
    """
    found = Neighbours(among, min(k, len(among) - fellows))
    index, distance = torch.empty(len(points), found.k, dtype=torch.int64), torch.empty(len(points))

    def search(part: slice) -> None:
        index[part], _ = found.of(points[part], part if fellows else None)
        distance[part] = (points[part, None] - among[index[part]]).square().sum(2).sqrt().mean(1)

    in_blocks(len(points), search)
    return index, distance
