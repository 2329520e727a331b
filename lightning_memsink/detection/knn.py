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

from lightning_memsink._chunks import ROWS, blocks, in_blocks

GROUP, FEW = 4, 256
"""Rows that the nearest of them stands for, twice as many among many; as many rows as are ranked without groups."""
FARTHEST = float(torch.finfo(torch.float32).max)
"""Stands for what is infinite, whose bits can't carry a number: they would say that it is none."""


class Room:
    """Space for the distances of a block of points to ``columns`` rows, and for as many numbered ones."""

    def __init__(self, columns: int) -> None:
        entries = ROWS * (columns + 2 * GROUP)  # the last group may have to be filled up
        self._apart, self._keys = torch.empty(entries), np.empty(entries)

    def apart(self, rows: int, columns: int) -> Tensor:
        return self._apart[: rows * columns].view(rows, columns)

    def least(self, values: Tensor, numbers: NDArray[np.int64], k: int) -> NDArray[np.float64]:
        """The ``k`` smallest of each row of ``values`` ``[B, C]``, in any order, which carry their ``numbers`` (below
        2^29, ``[C]`` or ``[B, C]``) in the bits that double precision has to spare; of equals the lowest numbers."""
        keys = self._keys[: values.numel()].reshape(values.shape)
        np.copyto(keys, values.clamp_(max=FARTHEST).numpy())
        bits = keys.view(np.int64)
        np.bitwise_or(bits, numbers, out=bits)
        keys.partition(k - 1, 1)
        return keys[:, :k].copy()


def number_of(keys: NDArray[np.float64]) -> NDArray[np.int64]:
    """What `Room.least` let them carry."""
    return keys.view(np.int64) & ((1 << 29) - 1)


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

    Where rows are many they are taken in groups of neighbouring ones: the ``k`` nearest are in those ``k`` groups whose
    own nearest are the nearest. So two short lists are partitioned and not a long one, which is dear, and on some
    processors several times dearer than on others.

    ``rooms`` may be those of a search among as many rows or more.
    """

    def __init__(self, among: Tensor, k: int, rooms: Rooms | None = None) -> None:
        self.k, self.among = min(k, len(among)), among
        self.rooms = rooms or Rooms(len(among))
        width = GROUP if len(among) <= 4 * FEW else 2 * GROUP
        self._width = width if len(among) > max(FEW, 2 * width * self.k) else 1
        self._groups = -(-len(among) // self._width)
        # Column w·groups + g is member w of group g: the smallest of each group is found in one sweep.
        columns = torch.arange(self._width * self._groups)
        self._column = columns.view(self._width, self._groups).T.flatten()[: len(among)]
        self._centre = among.mean(0)  # products of small numbers lose less
        centred = among - self._centre
        squares = torch.full(columns.shape, FARTHEST)  # a group that is not full has members far from everyone
        squares[self._column] = centred.square().sum(1)
        factors = torch.zeros(among.shape[1], len(columns))
        factors[:, self._column] = -2 * centred.T
        self._squares, self._factors = squares, factors

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
                apart[torch.arange(len(points)), self._column[own]] = FARTHEST
            smallest = self._smallest(room, apart)
        smallest.sort(1)
        index = np.minimum(number_of(smallest), len(self.among) - 1)  # who is not a number is near nobody
        ranked = torch.from_numpy(smallest.astype(np.float32))
        return torch.from_numpy(index), (ranked + points.square().sum(1, keepdim=True)).clamp_(min=0)

    def _smallest(self, room: Room, apart: Tensor) -> NDArray[np.float64]:
        """Keys ``[B, k]`` that carry rows of ``among``."""
        if self._width == 1:
            return room.least(apart, np.arange(self._groups), self.k)
        members = apart.view(len(apart), self._width, self._groups)
        first = torch.from_numpy(np.fmin.reduce(members.numpy(), 1))
        groups = number_of(room.least(first, np.arange(self._groups), self.k))[:, None]
        chosen = members.gather(2, torch.from_numpy(groups).expand(-1, self._width, -1))
        rows = groups * self._width + np.arange(self._width)[:, None]
        return room.least(chosen.flatten(1), rows.reshape(len(apart), -1), self.k)


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
