"""Box-pruned nearest-neighbour search: points are sorted by a k-d tree, and rows far from a part's box are left out.

N  points      M  reference rows      F  features      k  neighbours
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_memsink._chunks import blocks, in_blocks
from lightning_memsink.detection.knn import NearestRows

MAX_PART_POINTS = 1 << 13
"""Most points of a part."""

LEAF_POINTS = 2048
"""Points of a leaf of the tree, at least, on average."""

SPLIT_SAMPLE = 32
"""Points for each leaf from which the splits are computed."""

RADIUS_PROBES = 32
"""Points of a part whose exact neighbours determine the search radius."""

RADIUS_QUANTILE = 0.9
"""The search radius is this quantile of the probes' distances to their k-th neighbours."""

MAX_KEPT_SHARE = 0.7
"""Rows are left out only if less than this share of them remains; else the search among all rows is as fast."""

MAX_REQUERY_POINTS = 512
"""Most points that are searched for again at once, with a larger radius."""


class KDPartition:
    """The leaves of a k-d tree (Bentley 1975): ``points`` ``[S, F]`` halved ``levels`` times along the widest axis."""

    def __init__(self, points: Tensor, levels: int) -> None:
        self.levels = levels
        self._axis, self._split = torch.zeros(2**levels - 1, dtype=torch.int64), torch.zeros(2**levels - 1)
        pending = deque([points])
        for node in range(2**levels - 1):
            inside = pending.popleft()
            if len(inside):
                extent = inside.amax(0) - inside.amin(0)
                self._axis[node] = axis = int(extent.argmax())
                self._split[node] = inside[:, axis].median()
            right = inside[:, self._axis[node]] > self._split[node]
            pending += [inside[~right], inside[right]]

    def leaf_of(self, points: Tensor) -> Tensor:
        """``[N]`` int16: the leaf of each of ``points`` ``[N, F]``."""
        node = torch.zeros(len(points), dtype=torch.int64)
        for _ in range(self.levels):
            coordinate = points.gather(1, self._axis[node, None])[:, 0]
            node = 2 * node + 1 + (coordinate > self._split[node])
        return (node - len(self._axis)).short()


class BoxPrunedSearch:
    """The result of ``full``, a search among ``[M, F]`` rows, for points that are close to one another.

    Rows farther from the points' bounding box than the search radius are left out. A point whose ``k``-th neighbour
    is beyond the radius is searched for again, with that distance as the radius, together with points of similar
    distance. So the result is exact.
    """

    def __init__(self, full: NearestRows) -> None:
        self.full = full

    def query(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """As `NearestRows.query`, of points ``[N, F]``."""
        probes = self.full.query(points[:: -(-len(points) // RADIUS_PROBES)])[1][:, -1].sort().values
        radius = probes[int(RADIUS_QUANTILE * (len(probes) - 1))]
        kept = self.rows_within(radius, points)
        if kept is None:
            return self.full.query(points)
        index, squared = self._query_among(kept, points)
        beyond = (squared[:, -1] > radius).nonzero().flatten()
        beyond = beyond[squared[beyond, -1].argsort()]
        for part in blocks(len(beyond), MAX_REQUERY_POINTS):
            rows = beyond[part]
            kept = self.rows_within(squared[rows[-1], -1], points[rows])
            index[rows], squared[rows] = self._query_among(kept, points[rows])
        return index, squared

    def rows_within(self, radius: Tensor, points: Tensor) -> Tensor | None:
        """Indices ``[K]`` of the rows at most ``radius``, squared, from the points' bounding box; None for all rows.

        None if fewer than k rows are within it, or too many for a smaller search to be worth its cost.
        """
        reference = self.full.reference
        outside = torch.maximum(points.amin(0) - reference, reference - points.amax(0)).clamp(min=0).square().sum(1)
        kept = (outside <= 1.001 * radius).nonzero().flatten()
        return kept if self.full.k <= len(kept) < MAX_KEPT_SHARE * len(reference) else None

    def _query_among(self, kept: Tensor | None, points: Tensor) -> tuple[Tensor, Tensor]:
        if kept is None:
            return self.full.query(points)
        index, squared = NearestRows(self.full.reference[kept], self.full.k, self.full.workspaces).query(points)
        return kept[index], squared


def partition(rows: Tensor, points_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``rows`` ``[N]`` in parts whose points are close to one another; one part, if there are few rows.

    ``points_of(some_rows)`` returns the points ``[B, F]`` of some of the rows.
    """
    levels = int(np.log2(max(1, len(rows) // LEAF_POINTS)))
    if not levels:
        return [rows] if len(rows) else []
    sample = rows[:: max(1, len(rows) // (SPLIT_SAMPLE << levels))]
    tree, leaf = KDPartition(points_of(sample), levels), torch.empty(len(rows), dtype=torch.int16)

    def assign(part: slice) -> None:
        leaf[part] = tree.leaf_of(points_of(rows[part]))

    in_blocks(len(rows), assign, 1 << 16)
    order = torch.from_numpy(np.argsort(leaf.numpy(), kind="stable"))
    by_leaf = rows[order].split(torch.bincount(leaf.long()).tolist())
    return [part for members in by_leaf if len(members) for part in members.split(MAX_PART_POINTS)]
