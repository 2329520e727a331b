"""Points that lie together have the same few controls around them: they are sorted, and the rest is left out.

N  points      M  rows among which they have neighbours      F  features      k  neighbours
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_memsink.blocks import in_blocks
from lightning_memsink.neighbours import Neighbours

LOT, POINTS, SEEN = 1 << 13, 2048, 32
"""Most points in a lot; how many a cell has, at least, on average; how many of them the cells are made by."""
ASKED, WITHIN, WORTH = 32, 0.93, 0.7
"""Points of a lot that tell how far to look; the share of them that this suffices; the share of rows worth keeping."""


class Cells:
    """A k-d tree (Bentley 1975): ``seen`` ``[S, F]`` halved ``levels`` times, where they are widest."""

    def __init__(self, seen: Tensor, levels: int) -> None:
        self.levels = levels
        self._axis, self._at = torch.zeros(2**levels - 1, dtype=torch.int64), torch.zeros(2**levels - 1)
        held = deque([seen])
        for node in range(2**levels - 1):
            mine = held.popleft()
            if len(mine):
                spread = mine.amax(0) - mine.amin(0)
                self._axis[node] = axis = int(spread.argmax())
                self._at[node] = mine[:, axis].median()
            right = mine[:, self._axis[node]] > self._at[node]
            held += [mine[~right], mine[right]]

    def of(self, points: Tensor) -> Tensor:
        """``[N]`` int16: the cell of each of ``points`` ``[N, F]``."""
        node = torch.zeros(len(points), dtype=torch.int64)
        for _ in range(self.levels):
            own = points.gather(1, self._axis[node, None])[:, 0]
            node = 2 * node + 1 + (own > self._at[node])
        return (node - len(self._axis)).short()


class Around:
    """What ``everyone`` finds, among its ``[M, F]`` rows, for ``points`` ``[N, F]`` that lie together.

    What is farther from the box around the points than some of them need to look is left out; whoever needs to look
    farther than that, is compared with everyone. So what is found is exact.
    """

    def __init__(self, everyone: Neighbours, points: Tensor) -> None:
        self._everyone, among = everyone, everyone.among
        some = everyone.of(points[:: -(-len(points) // ASKED)])[1][:, -1].sort().values
        self._reach = some[int(WITHIN * (len(some) - 1))]
        beside = torch.maximum(points.amin(0) - among, among - points.amax(0)).clamp(min=0).square().sum(1)
        self._kept = (beside <= 1.001 * self._reach).nonzero().flatten()
        worth = everyone.k <= len(self._kept) < WORTH * len(among)
        self._near = Neighbours(among[self._kept], everyone.k, everyone.rooms) if worth else None

    def of(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """As `Neighbours.of`, of some of the points."""
        if self._near is None:
            return self._everyone.of(points)
        index, squared = self._near.of(points)
        index = self._kept[index]
        beyond = (squared[:, -1] > self._reach).nonzero().flatten()
        if len(beyond):
            index[beyond], squared[beyond] = self._everyone.of(points[beyond])
        return index, squared


def lots(rows: Tensor, points_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``rows`` ``[N]`` in lots of points that lie together; one lot, if they are few.

    ``points_of``: the points ``[B, F]`` of some of the rows.
    """
    levels = int(np.log2(max(1, len(rows) // POINTS)))
    if not levels:
        return [rows] if len(rows) else []
    seen = rows[:: max(1, len(rows) // (SEEN << levels))]
    cells, cell = Cells(points_of(seen), levels), torch.empty(len(rows), dtype=torch.int16)

    def sort(part: slice) -> None:
        cell[part] = cells.of(points_of(rows[part]))

    in_blocks(len(rows), sort, 1 << 16)
    order = torch.from_numpy(np.argsort(cell.numpy(), kind="stable"))
    by_cell = rows[order].split(torch.bincount(cell.long()).tolist())
    return [lot for mine in by_cell if len(mine) for lot in mine.split(LOT)]
