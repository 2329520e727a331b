"""Rules of provenance for cutting a tensor into pieces: split, chunk, unbind."""

from __future__ import annotations

from itertools import accumulate

from lightning_memsink.losses.provenance import Owners, Provenance, Rows, rows
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each


def split(call: Call) -> Outcome:
    """Pieces along the axis along which their shapes differ from the whole."""
    source, pieces = call.tensor(0, "tensor", "input", "self"), list(call.result)
    provenance = call.of(source)
    if not isinstance(provenance, Rows):
        return [provenance] * len(pieces)
    axes = {axis for piece in pieces for axis, extent in enumerate(piece.shape) if extent != source.shape[axis]}
    if not axes:  # one piece, which is the whole
        return [provenance] * len(pieces)
    (axis,) = axes
    extents = [piece.shape[axis] for piece in pieces]
    if sum(extents) != source.shape[axis]:
        raise NotFollowed
    if all(owners.shape[axis] == 1 for owners in provenance.candidates):
        return [provenance] * len(pieces)
    starts = accumulate(extents, initial=0)
    return [_piece(provenance, axis, start, extent) for start, extent in zip(starts, extents, strict=False)]


def _piece(provenance: Rows, axis: int, start: int, extent: int) -> Provenance:
    return rows(
        owners if owners.shape[axis] == 1 else owners.narrow(axis, start, extent) for owners in provenance.candidates
    )


def unbind(call: Call) -> Outcome:
    source, pieces = call.tensor(), list(call.result)
    provenance, axis = call.of(source), int(call.get(1, "dim", default=0))
    if not isinstance(provenance, Rows):
        return [provenance] * len(pieces)
    if all(owners.shape[axis] == 1 for owners in provenance.candidates):
        return [each(provenance, lambda owners: owners.squeeze(axis))] * len(pieces)
    readings = [owners.expand(_with(owners, axis, len(pieces))).unbind(axis) for owners in provenance.candidates]
    return [rows(piece) for piece in zip(*readings, strict=True)]


def _with(owners: Owners, axis: int, extent: int) -> list[int]:
    shape = list(owners.shape)
    shape[axis] = extent
    return shape


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "split chunk tensor_split hsplit vsplit dsplit split_with_sizes unsafe_split unsafe_chunk "
        "unsafe_split_with_sizes".split(),
        split,
    ),
    "unbind": unbind,
    "unbind_copy": unbind,
}
