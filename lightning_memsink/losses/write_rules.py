"""Rules of provenance for writing by an index: ``x[index] = y``, index_put, scatter, index_add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.index_rules import Item, Layout, index_parts, items_of, layout_of, on_owners
from lightning_memsink.losses.layout_rules import expanded
from lightning_memsink.losses.provenance import (
    MOST_ELEMENTS,
    OF_NO_SAMPLE,
    Lost,
    Owners,
    Part,
    Provenance,
    Rows,
    merge,
    rows,
)
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each, not_followed, sole

ADDED = "rows of different samples that are written to one place"
NO_NUMBER = 2**62


def setitem(call: Call) -> Outcome:
    target, index, value = call.args
    return written(call, target, index, value, accumulate=False)


def index_put(call: Call) -> Outcome:
    accumulate = bool(call.get(3, "accumulate", default=False))
    indices = tuple(slice(None) if i is None else i for i in call.get(1, "indices"))
    return written(call, call.tensor(), indices, call.get(2, "values"), accumulate)


def written(call: Call, target: Tensor, index: Any, value: Any, accumulate: bool) -> Provenance | None:
    """Provenance of ``target`` after ``target[index] = value``. Constants that are written change no owner."""
    before, shape = call.of(target), target.shape
    if isinstance(before, Lost):
        return before
    provenance, extents = call.part(value)
    if before is not None and provenance is None:
        return before
    items = items_of(index, len(shape))
    layout = layout_of(items)
    ndim = len(layout.axes)
    if len(extents) > ndim:  # axes of extent 1 in front, which torch ignores
        provenance = each(provenance, lambda owners: owners.reshape(owners.shape[owners.ndim - ndim :]))
        extents = extents[len(extents) - ndim :]
    region = _region(items, layout, shape)
    parts: list[Part] = [(provenance, extents)]
    if provenance is None:
        parts += index_parts(items, (), ndim, region, call.of)
    new = merge(parts, region)
    if new is None or isinstance(new, Lost):
        return new
    ours, theirs = sole(before, len(shape)), sole(new, ndim)
    assert theirs is not None
    whole = {axis for item in items if not _is_whole(item.value) for axis in item.axes}
    whole |= {axis for place, axis in enumerate(layout.axes) if axis is not None and theirs.shape[place] != 1}
    return _write(ours, theirs, items, shape, sorted(whole), accumulate)


def _write(
    ours: Owners | None, theirs: Owners, items: Sequence[Item], shape: Sequence[int], whole: list[int], accumulate: bool
) -> Provenance:
    base = theirs.new_full([1] * len(shape), OF_NO_SAMPLE) if ours is None else ours
    base = expanded(base, shape, whole).clone()
    place = tuple(on_owners(base, shape, items, whole))
    old = base[place]
    if accumulate and not bool(((old == theirs) | (old < 0) | (theirs < 0)).all()):
        return Lost(ADDED)
    new = torch.maximum(old, theirs) if accumulate else theirs.expand(old.shape)
    base[place] = new
    if not torch.equal(base[place], new):
        return Lost(ADDED)
    return rows([base])


def _is_whole(value: Any) -> bool:
    return value is None or (isinstance(value, slice) and value == slice(None))


def _region(items: Sequence[Item], layout: Layout, shape: Sequence[int]) -> list[int]:
    """The shape of ``target[index]``."""
    tensors = [item for item in items if item.is_tensor and not item.is_integer]
    shapes = [(int(i.value.count_nonzero()),) if i.is_mask else tuple(i.value.shape) for i in tensors]
    slices = {item.axes[0]: item.value for item in items if isinstance(item.value, slice)}
    extents = [1 if axis is None else len(range(*slices[axis].indices(shape[axis]))) for axis in layout.axes]
    extents[layout.start : layout.start + layout.wide] = torch.broadcast_shapes(*shapes) if shapes else ()
    return extents


def scatter(call: Call) -> Outcome:
    """scatter, scatter_add, scatter_reduce, index_add, index_copy: places of the target get rows of the source.

    A place is a sample's if all that is put there is that sample's; where a place mixes samples, all is lost.
    """
    target, axis, index = call.tensor(), call.get(1, "dim"), call.get(2, "index")
    source = call.get(3, "src", "source", "value", "values")
    before, (given, extents), chosen = call.of(target), call.part(source), call.of(index)
    if target.ndim == 0 or isinstance(before, Lost):
        return before if isinstance(before, Lost) else Lost("a write to a scalar")
    axis %= target.ndim
    if given is None:
        given, extents = chosen, index.shape
        if call.name.startswith("index"):
            given = each(given, lambda owners: owners.reshape([-1 if a == axis else 1 for a in range(target.ndim)]))
            extents = [n if a == axis else 1 for a, n in enumerate(source.shape)] if isinstance(source, Tensor) else ()
    if given is None or isinstance(given, Lost):
        return given or before
    ours, theirs = sole(before, target.ndim), sole(given, target.ndim)
    assert theirs is not None
    if index.ndim == target.ndim and not call.name.startswith("index"):
        for place, extent in enumerate(theirs.shape):  # torch lets a source be larger than its index
            if extent > index.shape[place]:
                theirs = theirs.narrow(place, 0, index.shape[place])
    overwrites = call.name in ("scatter", "index_copy") and call.get(4, "reduce") is None
    if theirs.shape[axis] == 1 and (ours is None or ours.shape[axis] == 1):
        if all(o == 1 or o == extent for o, extent in zip(theirs.shape, target.shape, strict=True)):
            given = Rows((theirs,))
            within = chosen if not call.name.startswith("index") and index.ndim == target.ndim else None
            return merge([(before, target.shape), (given, extents), (within, index.shape)], target.shape)
    if index.ndim != target.ndim or call.name.startswith("index"):
        index = index.reshape([-1 if place == axis else 1 for place in range(target.ndim)])
    return _scattered(ours, theirs, axis, index, target.shape, overwrites)


def _scattered(
    ours: Owners | None, theirs: Owners, axis: int, index: Tensor, shape: Sequence[int], overwrites: bool
) -> Provenance:
    base = theirs.new_full([1] * len(shape), OF_NO_SAMPLE) if ours is None else ours
    for place in range(len(shape)):  # an index that was expanded is the same along the new axis
        same = place != axis and base.shape[place] == 1 and theirs.shape[place] == 1
        if same and index.shape[place] > 1 and index.stride(place) == 0:
            index = index.narrow(place, 0, 1)
    full = [max(extent, index.shape[place]) for place, extent in enumerate(theirs.shape)]
    whole = [place for place, extent in enumerate(full) if extent != 1]
    index = index.cpu().expand(full)
    base = expanded(base, shape, [axis, *whole])
    pieces = theirs.expand(full)
    if pieces.numel() > MOST_ELEMENTS:
        raise NotFollowed
    highest = base.scatter_reduce(axis, index, pieces, "amax", include_self=not overwrites)
    least = torch.where(base < 0, NO_NUMBER, base).scatter_reduce(
        axis, index, torch.where(pieces < 0, NO_NUMBER, pieces), "amin", include_self=not overwrites
    )
    if bool(((highest >= 0) & (least != NO_NUMBER) & (least != highest)).any()):
        return Lost(ADDED)
    return rows([highest])


RULES: dict[str, Rule] = {
    "__setitem__": setitem,
    "index_put": index_put,
    **dict.fromkeys("scatter scatter_add scatter_reduce index_add index_copy index_reduce".split(), scatter),
    **dict.fromkeys("masked_scatter put scatter_nd segment_reduce".split(), not_followed),
}
