"""One loss for each sample of a second look: of a document that is cut into windows, that of all of them.

V  losses that were measured      S  samples
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.samples.unique import first_of_each


def join_looks(
    samples: Tensor, losses: Tensor, elements: Tensor, rows: Tensor, windows: Tensor
) -> tuple[Tensor, Tensor]:
    """Distinct ``samples`` ``[S]`` in ascending order and their losses ``[S]``, NaN where none is finite.

    A sample that was measured more than once has the first finite loss. A document in windows has the mean over the
    elements of its windows with a finite loss; it is left out if fewer of them were found than it has.

    Args:
        samples: ``[V]`` int64, whose loss it is.
        losses: ``[V]`` mean over the elements of each.
        elements: ``[V]`` how many these are.
        rows: ``[V]`` of the data set.
        windows: ``[V]`` how many windows, in as many rows of the data set, the sample has; 1 or less for no windows.
    """
    order = losses.isnan().long().argsort(stable=True)
    samples, losses, elements, rows, windows = (
        each[order] for each in (samples, losses, elements.float(), rows, windows)
    )
    distinct, first = first_of_each(samples)
    is_cut = windows > 1
    if not bool(is_cut.any()):
        return distinct, losses[first]
    pairs = torch.stack([samples, torch.where(is_cut, rows, -1)], 1)
    _, which = pairs.unique(dim=0, return_inverse=True)
    _, each_once = first_of_each(which)
    place = torch.searchsorted(distinct, samples[each_once])
    known = losses[each_once].isfinite()
    weights = torch.where(known, elements[each_once], 0.0).double()
    zeros = torch.zeros(len(distinct), dtype=torch.float64)
    sums = zeros.index_add(0, place, torch.where(known, losses[each_once], 0.0).double() * weights)
    means = (sums / zeros.index_add(0, place, weights)).float()
    found = torch.bincount(place, minlength=len(distinct))
    cut = is_cut[first]
    kept = ~cut | (found >= windows[first])
    return distinct[kept], torch.where(cut, means, losses[first])[kept]
