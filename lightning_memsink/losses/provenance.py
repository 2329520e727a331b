"""Which sample of the batch each element of a tensor belongs to, and how that passes through sums and products.

Whatever can't be followed is `Lost`, with a reason in words: a wrong owner is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_memsink.samples.documents import COUNTS_FOR_NONE

Owners: TypeAlias = Tensor
"""int64 on the CPU, with the ndim of the tensor it describes and each extent 1 or the tensor's: the number of a sample
of the batch, or -1 where an element is of no sample (a row of padding), or -2 where it counts for none, whatever it is
computed with. An extent is 1 along each axis where the owner is the same, so an axis along which owners vary is one
whose extent is not 1."""

OF_NO_SAMPLE = -1
MIXED = "rows of different samples in one element (mixup)"
SUMMED = "a sum over the samples"
MOST_ELEMENTS = 2**24  # owners are int64: 128 MiB


@dataclass(frozen=True, eq=False)
class Rows:
    """The owners of a tensor's elements; several readings after an outer combination.

    ``z @ z.T`` has two: the sample of its row and that of its column. An element depends on no sample but those of its
    readings, statistics of the batch aside. A reduction leaves the readings that are constant along the reduced axes:
    in a softmax over the columns the row is the anchor.
    """

    candidates: tuple[Owners, ...]


@dataclass(frozen=True)
class Lost:
    """The tensor depends on the batch, and whose its elements are is not known."""

    reason: str


Provenance: TypeAlias = Rows | Lost
"""Of a tensor that depends on the batch. A constant has none: ``None``."""

Part: TypeAlias = tuple[Provenance | None, Sequence[int]]
"""The provenance of an operand, and its shape."""


def compress(owners: Owners) -> Owners:
    """The same owners with extent 1 along each axis where they are constant; -1 everywhere if there are no elements."""
    if owners.numel() == 0:
        return torch.full([1] * owners.ndim, OF_NO_SAMPLE, device="cpu")
    for axis, extent in enumerate(owners.shape):
        if extent > 1:
            first = owners.narrow(axis, 0, 1)
            if torch.equal(owners, first.expand(owners.shape)):
                owners = first
    return owners


def rows(candidates: Iterable[Owners]) -> Rows:
    """Compressed readings, each once."""
    kept: list[Owners] = []
    for owners in candidates:
        owners = compress(owners)
        if not any(owners is other or same(owners, other) for other in kept):
            kept.append(owners)
    return Rows(tuple(kept))


def same(ours: Owners, theirs: Owners) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


def aligned(owners: Owners, ndim: int) -> Owners:
    """With axes of extent 1 in front, as broadcasting adds them."""
    return owners if owners.ndim == ndim else owners.reshape([1] * (ndim - owners.ndim) + list(owners.shape))


def owners_of_rows(provenance: Provenance | None, shape: Sequence[int]) -> Tensor | None:
    """The owners, expanded to ``shape`` (without memory), if there is one reading and no other."""
    if isinstance(provenance, Rows) and len(provenance.candidates) == 1:
        return provenance.candidates[0].expand(tuple(shape))
    return None


def merge(parts: Iterable[Part], shape: Sequence[int]) -> Provenance | None:
    """Provenance of what is computed elementwise, with broadcasting, from operands; its shape is ``shape``.

    Constants count for nothing. Owners that vary along the same axis must be equal there, and owners that vary along no
    axis must be equal to all others; of two that vary along different axes both are readings. What is lost counts for
    nothing either where it is a statistic: it has extent 1 along each axis where the owners vary.
    """
    ndim = len(shape)
    known: Rows | None = None
    lost: list[tuple[Lost, Sequence[int]]] = []
    for provenance, extents in parts:
        if provenance is None:
            continue
        if isinstance(provenance, Lost):
            lost.append((provenance, extents))
            continue
        if len(extents) != ndim:
            provenance = Rows(tuple([aligned(owners, ndim) for owners in provenance.candidates]))
        if known is None:
            known = provenance
        elif provenance is not known:
            known = _together(known, provenance)
            if known is None:
                return Lost(MIXED)
    for statistic, extents in lost:
        if known is None or not _is_statistic(extents, known, ndim):
            return statistic
    return known


def of_mask(provenance: Provenance | None) -> Provenance | None:
    """Provenance of a comparison: targets that count for none are targets no more."""
    if not isinstance(provenance, Rows) or not any(bool((o == COUNTS_FOR_NONE).any()) for o in provenance.candidates):
        return provenance
    return rows(owners.clamp(min=OF_NO_SAMPLE) for owners in provenance.candidates)


def reduce(
    provenance: Provenance | None,
    shape: Sequence[int],
    dims: Iterable[int],
    keepdim: bool = False,
    reason: str = SUMMED,
) -> Provenance | None:
    """Provenance of a reduction over ``dims`` of a tensor of shape ``shape``; ``Lost(reason)`` if it mixes samples.

    Elements of no sample count for nothing: a sum over a sample's rows and padding is that sample's.
    """
    if not isinstance(provenance, Rows):
        return provenance
    ndim = len(shape)
    reduced = {dim % ndim for dim in dims} if ndim else set()
    kept = [owners for owners in map(lambda o: collapse(o, reduced), provenance.candidates) if owners is not None]
    if not kept:
        return Lost(reason)
    if not keepdim and reduced:
        kept = [o.reshape([extent for axis, extent in enumerate(o.shape) if axis not in reduced]) for o in kept]
    if len(kept) > 1:
        return rows(kept)
    if len(provenance.candidates) == 1 and kept[0] is provenance.candidates[0]:
        return provenance
    return Rows(tuple(kept))


def collapse(owners: Owners, axes: Iterable[int]) -> Owners | None:
    """Owners with extent 1 along ``axes``, or None if different samples meet along them."""
    varying = [axis for axis in axes if owners.shape[axis] != 1]
    if not varying:
        return owners
    largest = owners.amax(varying, keepdim=True)
    return compress(largest) if bool(((owners == largest) | (owners < 0)).all()) else None


def _together(ours: Rows, theirs: Rows) -> Rows | None:
    """Readings of an element made of two: those that agree once, others beside them if they vary along other axes."""
    left = list(theirs.candidates)
    kept: list[Owners] = []
    alone: list[Owners] = []
    for owners in ours.candidates:
        for number, other in enumerate(left):
            both = _agreed(owners, other)
            if both is not None:
                kept.append(both)
                del left[number]
                break
        else:
            kept.append(owners)
            alone.append(owners)
    if any(not _vary_apart(owners, other) for owners in alone for other in left):
        return None
    if not left and all(mine is other for mine, other in zip(kept, ours.candidates, strict=True)):
        return ours
    return Rows((*kept, *left))


def _agreed(ours: Owners, theirs: Owners) -> Owners | None:
    """The owners if they are equal wherever neither is of no sample. What counts for none does so with any other: a
    target that another document's token would predict, times a mask of that document's."""
    if ours is theirs or same(ours, theirs):
        return ours
    if _vary_apart(ours, theirs) or not bool(((ours == theirs) | (ours < 0) | (theirs < 0)).all()):
        return None
    counts_for_none = torch.minimum(ours, theirs) == COUNTS_FOR_NONE
    return compress(torch.maximum(ours, theirs).masked_fill(counts_for_none, COUNTS_FOR_NONE))


def _vary_apart(ours: Owners, theirs: Owners) -> bool:
    """Whether each varies along some axis, and both along none."""
    pairs = list(zip(ours.shape, theirs.shape, strict=True))
    return (
        any(mine != 1 for mine, _ in pairs)
        and any(other != 1 for _, other in pairs)
        and not any(mine != 1 and other != 1 for mine, other in pairs)
    )


def _is_statistic(extents: Sequence[int], known: Rows, ndim: int) -> bool:
    """Whether an operand of shape ``extents`` is the same for all samples of ``known``."""
    full = [1] * (ndim - len(extents)) + list(extents)
    return all(
        any(extent != 1 for extent in owners.shape)
        and all(mine == 1 or other == 1 for mine, other in zip(owners.shape, full, strict=True))
        for owners in known.candidates
    )
