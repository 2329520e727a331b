"""Points that lie together have the same few controls around them: they are sorted, and the rest is left out.

N  points      M  rows among which they have neighbours      F  features      k  neighbours
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_memsink._chunks import blocks, in_blocks
from lightning_memsink.detection.knn import Neighbours

LOT, POINTS, SEEN = 1 << 13, 2048, 32
"""Most points in a lot; how many a cell has, at least, on average; how many of them the cells are made by."""
ASKED, WITHIN, WORTH = 32, 0.9, 0.7
"""Points of a lot that tell how far to look; the share of them that this suffices; the share of rows worth keeping."""
TOGETHER = 512
"""Most of the points that look farther which are searched for at once."""


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
    """What ``everyone`` finds, among its ``[M, F]`` rows, for points that lie together, and so have few rows around.

    Rows farther from the box around the points than some of them need to look are left out. Who needs to look farther
    knows by then how far at most, and is searched for anew with who needs to look about as far. So what is found is
    exact.
    """

    def __init__(self, everyone: Neighbours) -> None:
        self.everyone = everyone

    def of(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """As `Neighbours.of`, of points ``[N, F]``."""
        some = self.everyone.of(points[:: -(-len(points) // ASKED)])[1][:, -1].sort().values
        reach = some[int(WITHIN * (len(some) - 1))]
        kept = self.within(reach, points)
        if kept is None:
            return self.everyone.of(points)
        index, squared = self._among(kept, points)
        beyond = (squared[:, -1] > reach).nonzero().flatten()
        beyond = beyond[squared[beyond, -1].argsort()]
        for part in blocks(len(beyond), TOGETHER):
            rows = beyond[part]
            kept = self.within(squared[rows[-1], -1], points[rows])
            index[rows], squared[rows] = self._among(kept, points[rows])
        return index, squared

    def within(self, reach: Tensor, points: Tensor) -> Tensor | None:
        """The rows ``[K]`` at most ``reach``, squared, from the box around the points; None for all, if most are."""
        among = self.everyone.among
        beside = torch.maximum(points.amin(0) - among, among - points.amax(0)).clamp(min=0).square().sum(1)
        kept = (beside <= 1.001 * reach).nonzero().flatten()
        return kept if self.everyone.k <= len(kept) < WORTH * len(among) else None

    def _among(self, kept: Tensor | None, points: Tensor) -> tuple[Tensor, Tensor]:
        if kept is None:
            return self.everyone.of(points)
        index, squared = Neighbours(self.everyone.among[kept], self.everyone.k, self.everyone.rooms).of(points)
        return kept[index], squared


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
