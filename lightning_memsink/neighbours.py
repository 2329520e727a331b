"""The nearest of a few thousand controls, for each of many samples: exact, and without a matrix of all pairs.

N  points      M  rows among which they have neighbours      F  features      k  neighbours
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_memsink.blocks import ROWS, blocks, in_blocks


class Room:
    """Space for the distances of a block of points to ``columns`` rows, and for the same in double precision."""

    def __init__(self, columns: int) -> None:
        self._apart, self._keys = torch.empty(ROWS * columns), np.empty(ROWS * columns)

    def apart(self, rows: int, columns: int) -> Tensor:
        return self._apart[: rows * columns].view(rows, columns)

    def keys(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """The same values; they have 29 bits to spare, which carry a value's column through what sorts them."""
        keys = self._keys[: values.size].reshape(values.shape)
        np.copyto(keys, values)
        bits = keys.view(np.int64)
        np.bitwise_or(bits, np.arange(values.shape[1]), out=bits)
        return keys


class Rooms:
    """A `Room` for each thread, used again and again: to have it anew takes longer than to fill it."""

    def __init__(self, columns: int) -> None:
        self._free: SimpleQueue[Room] = SimpleQueue()
        for _ in range(torch.get_num_threads()):
            self._free.put(Room(columns))

    @contextmanager
    def lent(self) -> Iterator[Room]:
        """One that nobody else uses meanwhile."""
        room = self._free.get()
        try:
            yield room
        finally:
            self._free.put(room)


class Neighbours:
    """Finds the ``k`` nearest rows of ``among`` ``[M, F]`` (all of them, if there are fewer).

    ``rooms`` may be those of a search among as many rows or more.
    """

    def __init__(self, among: Tensor, k: int, rooms: Rooms | None = None) -> None:
        self.k, self.among = min(k, len(among)), among
        self.rooms = rooms or Rooms(len(among))
        self._centre = among.mean(0)  # products of small numbers lose less
        centred = among - self._centre
        self._squares, self._factors = centred.square().sum(1), (-2 * centred).T.contiguous()

    def of(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and squared distances ``[N, k]``, nearest first; the latter as exact as coordinates are."""
        index = torch.empty(len(points), self.k, dtype=torch.int64)
        squared = torch.empty(len(points), self.k)
        for part in blocks(len(points)):
            index[part], squared[part] = self.of_block(points[part])
        return index, squared

    def of_block(self, points: Tensor, own: slice | None = None) -> tuple[Tensor, Tensor]:
        """The same of up to ``ROWS`` points.

        ``own``: the rows of ``among`` that the points themselves are, and nobody is its own neighbour.
        """
        points = points - self._centre
        with self.rooms.lent() as room:
            apart = room.apart(len(points), len(self._squares))
            torch.addmm(self._squares, points, self._factors, out=apart)  # squared distance but for the point's square
            if own is not None:
                apart[torch.arange(len(points)), torch.arange(own.start, own.stop)] = torch.inf
            keys = room.keys(apart.numpy())
            keys.partition(self.k - 1, 1)
            smallest = keys[:, : self.k].copy()
        smallest.sort(1)
        index = smallest.view(np.int64) & ((1 << len(self._squares).bit_length()) - 1)
        ranked = torch.from_numpy(smallest.astype(np.float32))
        return torch.from_numpy(index), (ranked + points.square().sum(1, keepdim=True)).clamp_(min=0)


def nearest(points: Tensor, among: Tensor, k: int, *, fellows: bool = False) -> tuple[Tensor, Tensor]:
    """Indices ``[N, k]`` of the nearest rows of ``among``, nearest first, and the mean distance ``[N]`` to them.

    ``fellows``: the points are ``among`` themselves, and nobody is its own neighbour.
    """
    found = Neighbours(among, min(k, len(among) - fellows))
    index, distance = torch.empty(len(points), found.k, dtype=torch.int64), torch.empty(len(points))

    def search(part: slice) -> None:
        index[part], _ = found.of_block(points[part], part if fellows else None)
        distance[part] = (points[part, None] - among[index[part]]).square().sum(2).sqrt().mean(1)

    in_blocks(len(points), search)
    return index, distance
