"""Exact k-nearest-neighbour search: many points among a few thousand reference rows, without the full distance matrix.

N  points      M  reference rows      F  features      k  neighbours      B  points of a block

Distances of a block of points to all rows come from one matrix product, and the k smallest from a partial sort. On the
detector's sizes that is faster than ``scipy.spatial.cKDTree``, which the tests use as the oracle.
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

GROUP_SIZE = 4
"""Reference rows of a group, whose smallest distance represents it; twice as many where there are many rows."""

MAX_UNGROUPED_ROWS = 256
"""Up to this many reference rows are ranked one by one, without groups."""

MAX_DISTANCE = float(torch.finfo(torch.float32).max)
"""Replaces infinity: setting further mantissa bits of an infinite double would make it NaN."""

NUMBER_BITS = 29
"""Mantissa bits of a double that are zero in every converted float32 (52 of a double less 23 of a float)."""


class Workspace:
    """Buffers of one thread for the distances of a block of points to ``columns`` reference rows."""

    def __init__(self, columns: int) -> None:
        entries = ROWS * (columns + 2 * GROUP_SIZE)  # the last group may have to be filled up
        self._distances, self._keys = torch.empty(entries), np.empty(entries)

    def distances(self, rows: int, columns: int) -> Tensor:
        """An uninitialized ``[rows, columns]`` view of the buffer for distances."""
        return self._distances[: rows * columns].view(rows, columns)

    def smallest_keys(self, values: Tensor, numbers: NDArray[np.int64], k: int) -> NDArray[np.float64]:
        """``[B, k]`` sort keys of the ``k`` smallest ``values`` ``[B, C]`` of each row, in any order.

        A key is the float32 value as a double whose `NUMBER_BITS` lowest bits, otherwise zero, hold the entry of
        ``numbers`` (``[C]`` or ``[B, C]``, below 2^29). So one partial sort of doubles selects values and numbers
        together, and of equal values it selects the lowest numbers.
        """
        keys = self._keys[: values.numel()].reshape(values.shape)
        np.copyto(keys, values.clamp_(max=MAX_DISTANCE).numpy())
        bits = keys.view(np.int64)
        np.bitwise_or(bits, numbers, out=bits)
        keys.partition(k - 1, 1)
        return keys[:, :k].copy()


def numbers_in(keys: NDArray[np.float64]) -> NDArray[np.int64]:
    """The numbers in the keys of `Workspace.smallest_keys`, same shape."""
    return keys.view(np.int64) & ((1 << NUMBER_BITS) - 1)


class WorkspacePool:
    """One `Workspace` for each thread, reused: allocating one takes longer than filling it."""

    def __init__(self, columns: int) -> None:
        self._free: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(torch.get_num_threads()):
            self._free.put(Workspace(columns))

    @contextmanager
    def borrow(self) -> Iterator[Workspace]:
        """A workspace that no other thread uses until the block ends."""
        workspace = self._free.get()
        try:
            yield workspace
        finally:
            self._free.put(workspace)


class NearestRows:
    """Finds the ``k`` nearest rows of ``reference`` ``[M, F]`` (all of them, if there are fewer).

    Many rows are searched in groups of consecutive ones: the ``k`` nearest rows lie in the ``k`` groups whose nearest
    members are nearest. So two short lists are partially sorted instead of one long list, which is expensive, and on
    some processors several times more expensive than on others.

    ``workspaces`` may be those of another search among as many rows or more.
    """

    def __init__(self, reference: Tensor, k: int, workspaces: WorkspacePool | None = None) -> None:
        self.k, self.reference = min(k, len(reference)), reference
        self.workspaces = workspaces or WorkspacePool(len(reference))
        width = GROUP_SIZE if len(reference) <= 4 * MAX_UNGROUPED_ROWS else 2 * GROUP_SIZE
        self._width = width if len(reference) > max(MAX_UNGROUPED_ROWS, 2 * width * self.k) else 1
        self._groups = -(-len(reference) // self._width)
        # Column w·groups + g is member w of group g: one sweep finds the smallest of each group.
        columns = torch.arange(self._width * self._groups)
        self._column = columns.view(self._width, self._groups).T.flatten()[: len(reference)]
        self._centre = reference.mean(0)  # products of small numbers lose less precision
        centred = reference - self._centre
        squares = torch.full(columns.shape, MAX_DISTANCE)  # fills up the last group with rows far from every point
        squares[self._column] = centred.square().sum(1)
        factors = torch.zeros(reference.shape[1], len(columns))
        factors[:, self._column] = -2 * centred.T
        self._squares, self._factors = squares, factors

    def query(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and squared distances ``[N, k]``, nearest first. Distances have the precision of the coordinates."""
        index = torch.empty(len(points), self.k, dtype=torch.int64)
        squared = torch.empty(len(points), self.k)
        for part in blocks(len(points)):
            index[part], squared[part] = self.query_block(points[part])
        return index, squared

    def query_block(self, points: Tensor, excluded: slice | None = None) -> tuple[Tensor, Tensor]:
        """`query` for up to ``ROWS`` points. ``excluded``: point n skips the n-th reference row of this slice."""
        points = points - self._centre
        with self.workspaces.borrow() as workspace:
            distances = workspace.distances(len(points), len(self._squares))
            torch.addmm(self._squares, points, self._factors, out=distances)  # squared, less the point's own square
            if excluded is not None:
                distances[torch.arange(len(points)), self._column[excluded]] = MAX_DISTANCE
            keys = self._smallest_keys(workspace, distances)
        keys.sort(1)
        index = np.minimum(numbers_in(keys), len(self.reference) - 1)  # the bits of a NaN hold no row number
        ranked = torch.from_numpy(keys.astype(np.float32))
        return torch.from_numpy(index), (ranked + points.square().sum(1, keepdim=True)).clamp_(min=0)

    def _smallest_keys(self, workspace: Workspace, distances: Tensor) -> NDArray[np.float64]:
        """``[B, k]`` keys that hold the numbers of reference rows."""
        if self._width == 1:
            return workspace.smallest_keys(distances, np.arange(self._groups), self.k)
        members = distances.view(len(distances), self._width, self._groups)
        of_groups = torch.from_numpy(np.fmin.reduce(members.numpy(), 1))
        groups = numbers_in(workspace.smallest_keys(of_groups, np.arange(self._groups), self.k))[:, None]
        chosen = members.gather(2, torch.from_numpy(groups).expand(-1, self._width, -1))
        rows = groups * self._width + np.arange(self._width)[:, None]
        return workspace.smallest_keys(chosen.flatten(1), rows.reshape(len(distances), -1), self.k)


def nearest(points: Tensor, reference: Tensor, k: int, *, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """Indices ``[N, k]`` of the nearest rows of ``reference``, nearest first, and the mean distance ``[N]`` to them.

    ``leave_one_out``: ``points`` are the rows of ``reference``, and no row is its own neighbour.
    """
    search = NearestRows(reference, min(k, len(reference) - leave_one_out))
    index, distance = torch.empty(len(points), search.k, dtype=torch.int64), torch.empty(len(points))

    def query(part: slice) -> None:
        index[part], _ = search.query_block(points[part], part if leave_one_out else None)
        distance[part] = (points[part, None] - reference[index[part]]).square().sum(2).sqrt().mean(1)

    in_blocks(len(points), query)
    return index, distance
