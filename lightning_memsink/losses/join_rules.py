"""Rules of provenance for functions that put tensors together or repeat them: cat, stack, pad, repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.layout_rules import expanded, regroup
from lightning_memsink.losses.provenance import (
    MOST_ELEMENTS,
    OF_NO_SAMPLE,
    Lost,
    Owners,
    Part,
    Provenance,
    Rows,
    aligned,
    compress,
    rows,
    same,
)
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each, sole


def join(parts: Sequence[Part], axis: int) -> Provenance | None:
    """Provenance of tensors joined along ``axis``, all of one ndim.

    A constant's rows are of no sample, unless the other parts differ along another axis only: then each of its elements
    stands in the row of a sample, and is that sample's.
    """
    tracked = [provenance for provenance, _ in parts if provenance is not None]
    for provenance in tracked:
        if isinstance(provenance, Lost):
            return provenance
    readings = _matched([provenance for provenance in tracked if isinstance(provenance, Rows)], axis)
    if not tracked:
        return None
    if not readings:
        raise NotFollowed
    joined = []
    for reading in readings:
        known = iter(reading)
        joined.append(
            _joined([None if p is None else next(known) for p, _ in parts], [e[axis] for _, e in parts], axis)
        )
    return rows(joined)


def _matched(tracked: Sequence[Rows], axis: int) -> list[list[Owners]]:
    """Readings that every part has: for each, the owners of each part. Rows are joined to rows, columns to columns."""
    if all(len(part.candidates) == 1 for part in tracked):
        return [[part.candidates[0] for part in tracked]] if tracked else []
    matched = []
    fewest = min(tracked, key=lambda part: len(part.candidates))
    for owners in fewest.candidates:
        pattern = _pattern(owners, axis)
        fitting = [[o for o in part.candidates if _pattern(o, axis) == pattern] for part in tracked]
        if owners.shape[axis] == 1:  # of several readings, the one that is constant along the axis, too
            fitting = [[o for o in fits if o.shape[axis] == 1] for fits in fitting]
        if all(len(fits) == 1 for fits in fitting):
            matched.append([fits[0] for fits in fitting])
    return matched


def _pattern(owners: Owners, axis: int) -> list[bool]:
    return [extent != 1 for place, extent in enumerate(owners.shape) if place != axis]


def _joined(parts: Sequence[Owners | None], lengths: Sequence[int], axis: int) -> Owners:
    known = [owners for owners in parts if owners is not None]
    first = known[0]
    alike = first.shape[axis] == 1 and all(owners is first or same(owners, first) for owners in known)
    if alike and (len(known) == len(parts) or first.numel() != 1):
        return first
    extents = [max(owners.shape[place] for owners in known) for place in range(first.ndim)]
    padding = first.new_full([1] * first.ndim, OF_NO_SAMPLE)
    pieces = []
    for owners, length in zip(parts, lengths, strict=True):
        extents[axis] = length
        pieces.append((padding if owners is None else owners).expand(extents))
    if sum(piece.numel() for piece in pieces) > MOST_ELEMENTS:
        raise NotFollowed
    return torch.cat(pieces, axis)


def _sequence(call: Call) -> list[Tensor]:
    tensors = call.get(0, "tensors", "sequences", "input")
    return list(call.args) if isinstance(tensors, Tensor) and len(call.args) > 1 else list(tensors)


def _axis(call: Call) -> int:
    return int(call.get(1, "dim", "axis", default=0)) % max(1, len(call.shape))


def cat(call: Call) -> Outcome:
    ndim = len(call.shape)
    parts = [call.part(tensor) for tensor in _sequence(call)]
    return join([part for part in parts if len(part[1]) == ndim], _axis(call))  # torch lets empty vectors join anything


def stack(call: Call) -> Outcome:
    axis = _axis(call)
    return join([_opened(call.part(tensor), axis) for tensor in _sequence(call)], axis)


def _opened(part: Part, axis: int) -> Part:
    provenance, shape = part
    return each(provenance, lambda owners: owners.unsqueeze(axis)), [*shape[:axis], 1, *shape[axis:]]


def lifted(axis_of: Callable[[int], int], lift: Callable[[Tensor], Tensor]) -> Rule:
    """A rule for hstack, vstack, dstack and column_stack: cat after ``lift``, along an axis by the parts' ndim."""

    def rule(call: Call) -> Outcome:
        parts, axis = [], 0
        for tensor in _sequence(call):
            provenance, shape = call.part(tensor)
            parts.append((each(provenance, lift), lift(torch.empty(shape, device="meta")).shape))
            axis = axis_of(tensor.ndim)
        return join(parts, axis)

    return rule


def pad_sequence(call: Call) -> Outcome:
    """The padding of a sequence of one sample is its too; that of a sequence of several is of no sample."""
    batch_first = bool(call.get(1, "batch_first", default=False))
    sequences = _sequence(call)
    known = [sole(call.of(sequence), sequence.ndim) for sequence in sequences]
    first = next(owners for owners in known if owners is not None)
    wide = [max(1 if o is None else o.shape[axis] for o in known) for axis in range(1, first.ndim)]
    pieces = []
    for owners, sequence in zip(known, sequences, strict=True):
        owners = first.new_full([1] * first.ndim, OF_NO_SAMPLE) if owners is None else owners
        pieces.append(owners.expand([sequence.shape[0] if owners.shape[0] != 1 else 1, *wide]))
    longest = call.shape[1 if batch_first else 0]
    padded = [
        piece if piece.shape[0] == 1 else _with_rows(piece, longest - piece.shape[0], OF_NO_SAMPLE) for piece in pieces
    ]
    length = max(piece.shape[0] for piece in padded)
    joined = torch.stack([piece.expand(length, *wide) for piece in padded], 0 if batch_first else 1)
    return rows([joined])


def _with_rows(owners: Owners, count: int, value: int) -> Owners:
    return torch.cat([owners, owners.new_full([count, *owners.shape[1:]], value)])


def pad(call: Call) -> Outcome:
    """Padding is of no sample along an axis that carries owners; a border around one sample is that sample's."""
    source, widths = call.tensor(), list(call.get(1, "pad"))
    provenance, shape = call.of(source), source.shape
    if not isinstance(provenance, Rows):
        return provenance
    places = {source.ndim - 1 - place: (widths[2 * place], widths[2 * place + 1]) for place in range(len(widths) // 2)}
    padded = [axis for axis, width in places.items() if width != (0, 0)]
    constant = call.name == "constant_pad_nd" or call.get(2, "mode", default="constant") == "constant"

    def with_padding(owners: Owners) -> Owners:
        alone = len(padded) == 1 and owners.numel() == 1
        for axis in padded:
            if owners.shape[axis] == 1 and not alone:
                continue
            if not constant and not alone:
                raise NotFollowed
            if constant:
                zeros = [0, 0] * (owners.ndim - 1 - axis)
                owners = expanded(owners, shape, [axis])
                owners = torch.nn.functional.pad(owners, [*zeros, *places[axis]], value=OF_NO_SAMPLE)
        return compress(owners)

    return each(provenance, with_padding)


def tile(call: Call) -> Outcome:
    """``repeat`` and ``tile``."""
    source, shape = call.tensor(), call.shape
    before = [1] * (len(shape) - source.ndim) + list(source.shape)

    def repeated(owners: Owners) -> Owners:
        owners = aligned(owners, len(shape))
        return owners.repeat([1 if o == 1 else a // b for o, a, b in zip(owners.shape, shape, before, strict=True)])

    return each(call.of(source), repeated)


def repeat_interleave(call: Call) -> Outcome:
    source, repeats = call.tensor(), call.get(1, "repeats")
    dim = call.get(2, "dim")
    if repeats is None:  # the repeats alone give positions
        repeats, dim = source, 0
    if isinstance(repeats, Tensor) and repeats.numel() == 1:
        repeats = int(repeats)

    if call.of(source) is None and isinstance(repeats, Tensor):  # a constant: each number of copies is a sample's
        if source.ndim != 1:
            raise NotFollowed
        source = repeats

    def repeated(owners: Owners) -> Owners:
        if dim is None:
            owners = regroup(owners, source.shape, [source.numel()])
        axis = dim or 0
        if owners.shape[axis] == 1:
            return owners
        times: Any = repeats.cpu() if isinstance(repeats, Tensor) else repeats
        return compress(owners.repeat_interleave(times, axis))

    return each(call.of(source), repeated)


def copied(call: Call) -> Outcome:
    """``torch.tensor(data)`` and its like: of a tensor, or of a list of numbers and tensors of one number."""
    data = call.get(1 if call.name == "new_tensor" else 0, "data", "obj")
    if isinstance(data, Tensor):
        return call.of(data)
    if not isinstance(data, (list, tuple)) or call.result.ndim != 1:
        raise NotFollowed
    parts = [call.part(value) for value in data]
    return join([(each(provenance, lambda owners: owners.reshape(1)), [1]) for provenance, _ in parts], 0)


RULES: dict[str, Rule] = {
    **dict.fromkeys("cat concat concatenate".split(), cat),
    "stack": stack,
    **dict.fromkeys("tensor as_tensor asarray new_tensor".split(), copied),
    "hstack": lifted(lambda ndim: int(ndim > 1), torch.atleast_1d),
    "vstack": lifted(lambda ndim: 0, torch.atleast_2d),
    "row_stack": lifted(lambda ndim: 0, torch.atleast_2d),
    "dstack": lifted(lambda ndim: 2, torch.atleast_3d),
    "column_stack": lifted(lambda ndim: 1, lambda tensor: tensor if tensor.ndim > 1 else tensor.reshape(-1, 1)),
    "pad_sequence": pad_sequence,
    "pad": pad,
    "constant_pad_nd": pad,
    "repeat": tile,
    "tile": tile,
    "repeat_interleave": repeat_interleave,
}
