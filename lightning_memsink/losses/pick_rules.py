"""Rules of provenance for picking elements along an axis: gather, masked_select, sort, topk, nonzero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_memsink.losses.index_rules import first_places, selected
from lightning_memsink.losses.layout_rules import expanded
from lightning_memsink.losses.provenance import (
    MOST_ELEMENTS,
    Lost,
    Owners,
    Part,
    Provenance,
    Rows,
    aligned,
    merge,
    reduce,
    rows,
)
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each


def masked_select(call: Call) -> Outcome:
    source, mask = call.tensor(), call.tensor(1, "mask")
    shape = torch.broadcast_shapes(source.shape, mask.shape)
    here = each(call.of(source), lambda owners: aligned(owners, len(shape)))
    there = each(call.of(mask), lambda owners: aligned(owners, len(shape)))
    if here is None or (isinstance(here, Rows) and all(owners.numel() == 1 for owners in here.candidates)):
        here = merge([(here, shape), (there, shape)], shape)
    if not isinstance(here, Rows):
        return here
    return selected(here, shape, mask.expand(shape))


def gather(call: Call) -> Outcome:
    source, axis, index = call.tensor(), call.get(1, "dim"), call.get(2, "index")
    if source.ndim == 0:
        raise NotFollowed
    return gathered(call.part(source), axis % source.ndim, index, call.of(index))


def take_along_dim(call: Call) -> Outcome:
    source, index, axis = call.tensor(), call.tensor(1, "indices"), call.get(2, "dim")
    if axis is None:
        return take(call)
    axis %= source.ndim
    provenance, shape = call.part(source)
    wide = list(call.shape)
    wide[axis] = index.shape[axis]
    return gathered((provenance, shape), axis, index.expand(wide), call.of(index))


def gathered(source: Part, axis: int, index: Tensor, index_provenance: Provenance | None) -> Provenance | None:
    """Provenance of ``source.gather(axis, index)``."""
    provenance, shape = source
    if isinstance(provenance, Lost):
        return provenance
    candidates = provenance.candidates if provenance is not None else ()
    read_owners = [_gathered(owners, shape, axis, index) for owners in candidates]
    parts: list[Part] = [(rows(read_owners), index.shape)] if provenance is not None else []
    if all(owners.shape[axis] == 1 for owners in candidates):
        parts.append((index_provenance, index.shape))
    return merge(parts, index.shape)


def _gathered(owners: Owners, shape: Sequence[int], axis: int, index: Tensor) -> Owners:
    if owners.shape[axis] == 1:
        for place, extent in enumerate(owners.shape):
            if extent != 1 and extent != index.shape[place]:
                owners = owners.narrow(place, 0, index.shape[place])
        return owners
    for place in range(index.ndim):  # an index that was expanded is the same along the new axis
        if index.stride(place) == 0 and owners.shape[place] == 1 and index.shape[place] > 1:
            index = index.narrow(place, 0, 1)
    full = [extent if place == axis else max(extent, index.shape[place]) for place, extent in enumerate(owners.shape)]
    if index.numel() > MOST_ELEMENTS:
        raise NotFollowed
    return owners.expand(full).gather(axis, index.cpu())


def take(call: Call) -> Outcome:
    source, index = call.tensor(), call.tensor(1, "index", "indices")
    provenance = call.of(source)
    if isinstance(provenance, Lost):
        return provenance
    if provenance is None or all(owners.numel() == 1 for owners in provenance.candidates):
        here = each(provenance, lambda owners: owners.reshape([1] * index.ndim))
        return merge([(here, index.shape), call.part(index)], index.shape)
    everywhere = range(source.ndim)
    return rows(expanded(o, source.shape, everywhere).reshape(-1)[index.cpu()] for o in provenance.candidates)


def ordered(call: Call) -> Outcome:
    """sort, topk, kthvalue, median, mode, max and min along an axis: values, and the indices that picked them."""
    source, (values, indices) = call.tensor(), call.result
    provenance = call.of(source)
    if not isinstance(provenance, Rows):
        return [provenance, provenance]
    position = 2 if call.name in ("topk", "kthvalue") else 1
    axis = call.get(position, "dim", default=-1)
    if call.name == "sort" and isinstance(axis, bool):
        raise NotFollowed
    if source.ndim == 0:
        return [provenance, provenance]
    axis %= source.ndim
    positions = Lost("positions that were found by comparing samples")
    if call.name in ("sort", "topk"):
        within = reduce(provenance, source.shape, [axis], keepdim=True)
        if isinstance(within, Lost):
            return [gathered((provenance, source.shape), axis, indices, None), positions]
        return [within, within]
    within = reduce(provenance, source.shape, [axis], values.ndim == source.ndim, "a value picked among the samples")
    return [within, within]


def nonzero(call: Call) -> Outcome:
    """A row of positions is of the sample at that position."""
    source = call.tensor()
    provenance = call.of(source)
    if not isinstance(provenance, Rows):
        return provenance if isinstance(call.result, Tensor) else [provenance] * len(call.result)
    picked = call.result if isinstance(call.result, (tuple, list)) else call.result.unbind(1)
    zero = first_places(1)
    found = rows(
        owners[tuple(p.cpu() if e != 1 else zero for p, e in zip(picked, owners.shape, strict=True))].reshape(-1)
        for owners in provenance.candidates
    )
    if isinstance(call.result, Tensor):
        return each(found, lambda owners: owners.unsqueeze(1))
    return [found] * len(call.result)


def sorted_positions(call: Call) -> Outcome:
    """``argsort``."""
    source = call.tensor()
    axis = next((value for value in (call.get(1, "dim", default=-1),) if not isinstance(value, bool)), -1)
    return reduce(call.of(source), source.shape, [axis], True, "positions that were found by comparing samples")


RULES: dict[str, Rule] = {
    "masked_select": masked_select,
    "gather": gather,
    "take_along_dim": take_along_dim,
    "take": take,
    **dict.fromkeys("sort topk kthvalue mode".split(), ordered),
    "argsort": sorted_positions,
    "nonzero": nonzero,
    "argwhere": nonzero,
}
