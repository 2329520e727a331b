"""Rules of provenance for reading by an index: slices, masks, integer tensors.

An element that is read is the source's, wherever the index came from, if the index picks among samples; if it picks
within a sample, owners of the index and of the source must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memsink.losses.provenance import (
    Lost,
    Owners,
    Part,
    Provenance,
    Rows,
    merge,
    rows,
)
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, ProvenanceOf, Rule, each


class Item(NamedTuple):
    """One entry of an index. ``axes`` are those of the source that it reads; a mask reads as many as it has."""

    value: Any
    axes: tuple[int, ...]

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, Tensor)

    @property
    def is_mask(self) -> bool:
        return isinstance(self.value, Tensor) and self.value.dtype == torch.bool

    @property
    def is_integer(self) -> bool:
        return isinstance(self.value, int) or (isinstance(self.value, Tensor) and self.value.ndim == 0)


def items_of(index: Any, ndim: int) -> list[Item]:
    """The entries of ``source[index]`` for a source of ``ndim`` axes, an ellipsis written out.

    Raises:
        NotFollowed: An entry is of a kind that is not known.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    entries = [_entry(entry) for entry in entries]
    used = sum(_axes_read(entry) for entry in entries)
    filled: list[Any] = []
    for entry in entries:
        filled += [slice(None)] * (ndim - used) if entry is Ellipsis else [entry]
    if not any(entry is Ellipsis for entry in entries):
        filled += [slice(None)] * (ndim - used)
    items, axis = [], 0
    for entry in filled:
        read = _axes_read(entry)
        items.append(Item(entry, tuple(range(axis, axis + read))))
        axis += read
    return items


def _entry(entry: Any) -> Any:
    if isinstance(entry, (list, range)):
        if not all(isinstance(value, (int, bool, list)) for value in entry):
            raise NotFollowed
        return torch.tensor(list(entry), device="cpu", dtype=None if len(entry) else torch.long)
    if isinstance(entry, bool):
        raise NotFollowed
    if isinstance(entry, Tensor):
        if entry.dtype in (torch.bool, torch.uint8) and entry.ndim == 0:
            raise NotFollowed
        return entry.bool() if entry.dtype == torch.uint8 else entry
    if entry is None or entry is Ellipsis or isinstance(entry, slice):
        return entry
    if hasattr(entry, "__array__"):
        return _entry(torch.as_tensor(entry, device="cpu"))
    return int(entry)


def _axes_read(entry: Any) -> int:
    if entry is None or entry is Ellipsis:
        return 0
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


class Layout(NamedTuple):
    """Where the axes of an indexed tensor come from."""

    axes: list[int | None]
    """For each axis of the result: the source's axis, or None if it is new or comes from the index's tensors."""
    start: int
    """First of the axes that the index's tensors give."""
    wide: int
    """Number of these axes."""


def layout_of(items: Sequence[Item]) -> Layout:
    """torch reads integers first; if the tensors then stand side by side their axes stay there, else they go first."""
    left = [item for item in items if not item.is_integer]
    places = [place for place, item in enumerate(left) if item.is_tensor]
    wide = max((1 if left[place].is_mask else left[place].value.ndim for place in places), default=0)
    adjacent = bool(places) and places == list(range(places[0], places[-1] + 1))
    others: list[int | None] = [item.axes[0] if item.axes else None for item in left if not item.is_tensor]
    start = places[0] if adjacent else 0
    return Layout([*others[:start], *[None] * wide, *others[start:]], start, wide)


def on_owners(owners: Owners, shape: Sequence[int], items: Sequence[Item], keep: Sequence[int] = ()) -> list[Any]:
    """The same index for owners of a tensor of shape ``shape``, with nothing read along axes of extent 1.

    Axes in ``keep`` have their full extent.
    """
    index: list[Any] = []
    wide = layout_of(items).wide
    for item in items:
        varies = [owners.shape[axis] != 1 or axis in keep for axis in item.axes]
        if item.value is None:
            index.append(None)
        elif item.is_mask:
            picked = item.value.cpu().nonzero(as_tuple=True) if any(varies) else [None] * len(varies)
            index += [p if v else first_places(wide) for p, v in zip(picked, varies, strict=True)]
        elif item.is_integer or not item.is_tensor:
            least = slice(None) if isinstance(item.value, slice) else 0
            index.append((item.value.cpu() if item.is_tensor else item.value) if varies[0] else least)
        else:
            index.append(item.value.cpu() if varies[0] else first_places(wide))
    return index


def first_places(ndim: int) -> Tensor:
    return torch.zeros([1] * ndim, dtype=torch.long, device="cpu")


def read(source: Part, index: Any, result_shape: Sequence[int], provenance_of: ProvenanceOf) -> Provenance | None:
    """Provenance of ``source[index]``."""
    provenance, shape = source
    if isinstance(provenance, Lost):
        return provenance
    items = items_of(index, len(shape))
    candidates = provenance.candidates if provenance is not None else ()
    parts: list[Part] = []
    if provenance is not None:
        parts.append((rows(owners[tuple(on_owners(owners, shape, items))] for owners in candidates), result_shape))
    indexes = [item for item in items if item.is_tensor and provenance_of(item.value) is not None]
    if any(_picks_within(item, candidates) for item in indexes):
        parts += index_parts(items, candidates, len(result_shape), result_shape, provenance_of)
    return merge(parts, result_shape)


def _picks_within(item: Item, candidates: Sequence[Owners]) -> bool:
    return all(owners.shape[axis] == 1 for owners in candidates for axis in item.axes)


def index_parts(
    items: Sequence[Item],
    candidates: Sequence[Owners],
    ndim: int,
    result_shape: Sequence[int],
    provenance_of: ProvenanceOf,
) -> list[Part]:
    """Provenance of the tensors of an index that pick within samples, aligned with what is read."""
    layout = layout_of(items)
    before, wide = layout.start, layout.wide
    after = ndim - before - wide
    parts: list[Part] = []
    for item in items:
        if not item.is_tensor or not _picks_within(item, candidates):
            continue
        provenance, shape = provenance_of(item.value), tuple(item.value.shape)
        if item.is_mask:
            provenance, shape = selected(provenance, shape, item.value), (result_shape[before + wide - 1],)
        extents = [1] * (before + wide - len(shape)) + list(shape) + [1] * after
        parts.append((each(provenance, lambda owners: _placed(owners, before, wide, after)), extents))
    return parts


def _placed(owners: Owners, before: int, wide: int, after: int) -> Owners:
    return owners.reshape([1] * (before + wide - owners.ndim) + list(owners.shape) + [1] * after)


def selected(provenance: Provenance | None, shape: Sequence[int], mask: Tensor) -> Provenance | None:
    """Provenance of the elements under a mask of the same shape, as a vector."""
    if not isinstance(provenance, Rows):
        return provenance
    if all(owners.numel() == 1 for owners in provenance.candidates):
        return each(provenance, lambda owners: owners.reshape(1))
    picked = mask.cpu().nonzero(as_tuple=True)
    zero = first_places(1)
    return rows(
        owners[tuple(p if e != 1 else zero for p, e in zip(picked, owners.shape, strict=True))]
        for owners in provenance.candidates
    )


def getitem(call: Call) -> Outcome:
    return read(call.part(call.tensor()), call.args[1], call.shape, call.of)


def select(call: Call) -> Outcome:
    source, axis, index = call.tensor(), call.get(1, "dim"), call.get(2, "index")
    return read(call.part(source), _along(axis % source.ndim, index), call.shape, call.of)


def _along(axis: int, index: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * axis, index)


def narrow(call: Call) -> Outcome:
    source, axis, start = call.tensor(), call.get(1, "dim"), int(call.get(2, "start"))
    start = start % source.shape[axis] if source.shape[axis] else 0
    part = slice(start, start + int(call.get(3, "length")))
    return read(call.part(source), _along(axis % source.ndim, part), call.shape, call.of)


def index_select(call: Call) -> Outcome:
    source, axis, index = call.tensor(), call.get(1, "dim"), call.get(2, "index")
    if source.ndim == 0 or index.ndim == 0:
        raise NotFollowed
    return read(call.part(source), _along(axis % source.ndim, index), call.shape, call.of)


def embedding(call: Call) -> Outcome:
    """``F.embedding(indices, weight)``."""
    indices, weight = call.tensor(), call.tensor(1, "weight")
    return read(call.part(weight), indices, call.shape, call.of)


def embedding_of_weight(call: Call) -> Outcome:
    """``torch.embedding(weight, indices)``."""
    weight, indices = call.tensor(0, "weight"), call.tensor(1, "indices")
    return read(call.part(weight), indices, call.shape, call.of)


RULES: dict[str, Rule] = {
    "__getitem__": getitem,
    "select": select,
    "select_copy": select,
    "narrow": narrow,
    "narrow_copy": narrow,
    "index_select": index_select,
    "F.embedding": embedding,
    "embedding": embedding_of_weight,
}
