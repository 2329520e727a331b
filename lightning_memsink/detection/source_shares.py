"""Which share of each source is memorized, by all gaps of its samples rather than by those that were flagged alone.

S  sources      n  measured samples of a source
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_memsink.detection.memorized_share import Scores, lowest_shares, shares_above
from lightning_memsink.detection.source_summary import measured_rows
from lightning_memsink.detection.verdicts import Flags
from lightning_memsink.samples.loss_table import LossTable

MOST = 4096
"""Samples of a source that are read: their interval is narrow enough."""


def source_shares(table: LossTable, flags: Flags, codes: Tensor, tail: float = 0.025) -> tuple[Tensor, Tensor, Tensor]:
    """The share of each source's samples that are memorized by more than the threshold, and both ends of its interval.

    A sample is flagged where its own gap leaves no doubt. A source whose samples all have a gap a little above the
    threshold is memorized without a single flag: its gaps together say so (`shares_above`).

    Args:
        codes: ``[S]`` of the sources, in order.
        tail: probability that a share is below its lower end.

    Returns:
        Three of ``[S]``, float64; NaN, 0 and 1 where nothing was measured or controls tell nothing.
    """
    share = torch.full((len(codes),), torch.nan, dtype=torch.float64)
    low, high = torch.zeros_like(share), torch.ones_like(share)
    null = flags.null_gaps[torch.isfinite(flags.null_gaps)].double()
    threshold = flags.evaluations[-1].threshold if flags.evaluations else math.nan
    if not len(codes) or len(null) < 2 or not math.isfinite(threshold) or bool(null.min() == null.max()):
        return share, low, high
    chance = float((null > threshold).double().mean())
    rows = measured_rows(flags)
    places = torch.searchsorted(codes, table.source[rows].long()).clamp(max=len(codes) - 1)
    known = codes[places] == table.source[rows]
    rows, places = _evenly(rows[known], places[known])
    own, places = places.unique(return_inverse=True)
    if len(rows):
        gap, columns = flags.gap[rows].double(), torch.arange(len(rows))
        is_in = torch.ones(len(rows), dtype=torch.bool)
        members = torch.sparse_coo_tensor(torch.stack([places, columns]), is_in, check_invariants=False)
        scores = Scores(gap, torch.full_like(gap, threshold), null, torch.full_like(gap, chance))
        share[own], _, high[own] = shares_above(scores, members)
        low[own] = torch.minimum(share[own], lowest_shares(scores, members, tail))
    return share, low, high


def _evenly(rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """At most about `MOST` samples at each place, evenly spread, in the order of places."""
    order = places.argsort(stable=True)
    counts = torch.bincount(places)
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[places[order]]
    kept = order[rank % (counts / MOST).ceil().long()[places[order]].clamp(min=1) == 0]
    return rows[kept], places[kept]
