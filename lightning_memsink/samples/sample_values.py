"""The values of one fetched sample, and whether a part of a batch holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
ELEMENTS = 64
"""Elements of a sample's tensor that are compared at most."""
_DEPTH, _BREADTH = 4, 24


def values_of(sample: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The numbers, arrays, tensors and lists of numbers of a sample, each with the keys that lead to it.

    Only Python's own containers are opened: another one may compute what it is asked for.
    """
    if isinstance(sample, (Tensor, int, float)) or _is_array(sample) or _is_numbers(sample):
        yield path, sample
    elif len(path) < _DEPTH:
        for name, part in _parts(sample)[:_BREADTH]:
            yield from values_of(part, (*path, name))


def rank(value: Any) -> int:
    """The number of axes of a value."""
    return len(_as_sequence(value)[1])


def holds(part: Tensor, value: Any, at_end: bool = False) -> bool | None:
    """Whether the row of a batch ``part`` holds a sample's ``value``: the same numbers where the two overlap.

    A row may be longer, by padding, or shorter, by truncation; they are laid together at their starts, or at their ends
    with ``at_end``. At most `ELEMENTS` places are compared, spread over all axes. None where there is nothing to
    compare. Numbers are compared in the row's dtype; floats are never compared with integers of a batch.
    """
    if part is value:
        return True
    value, extents = _as_sequence(value)
    if len(extents) != part.ndim:
        part = part.reshape([extent for extent in part.shape if extent != 1])
        if isinstance(value, Tensor):
            value = value.reshape([extent for extent in extents if extent != 1])
        elif len(extents) != part.ndim:
            return False
        extents = tuple(value.shape) if isinstance(value, Tensor) else extents
        if len(extents) != part.ndim:
            return False
    lengths = [min(own, other) for own, other in zip(part.shape, extents, strict=True)]
    if 0 in lengths:
        return None if 0 in extents else False
    each = max(1, int(ELEMENTS ** (1 / max(1, len(lengths)))))
    ours = _cropped(part.detach(), part.shape, lengths, each, at_end).cpu()
    theirs = _cropped(value, extents, lengths, each, at_end)
    if not isinstance(theirs, Tensor):
        theirs = torch.tensor(theirs.tolist() if hasattr(theirs, "tolist") else theirs)
    if theirs.is_floating_point() and not (ours.is_floating_point() or ours.is_complex()):
        return False
    theirs = theirs.detach().cpu().to(ours.dtype)
    return bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())  # NaN is as NaN


def start_of(value: Any, dtype: torch.dtype, at_end: bool, count: int = 4) -> tuple[float, ...]:
    """The first (or last) ``count`` numbers along the last axis of a value, as a batch of ``dtype`` would hold them."""
    value, extents = _as_sequence(value)
    if not extents:
        return (value.to(dtype).item(),)
    if 0 in extents:
        return ()
    last = slice(-count, None) if at_end else slice(count)
    line = value[last] if isinstance(value, (list, tuple)) else value[(-1 if at_end else 0,) * (len(extents) - 1)][last]
    return tuple(torch.as_tensor(line if isinstance(line, (Tensor, list, tuple)) else line.tolist()).to(dtype).tolist())


def _as_sequence(value: Any) -> tuple[Any, tuple[int, ...]]:
    if isinstance(value, (list, tuple)):
        return value, (len(value),)
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None), ()
    return value, tuple(value.shape)


def _cropped(value: Any, extents: tuple[int, ...], lengths: list[int], each: int, at_end: bool) -> Any:
    """At most ``each`` places along each axis of the overlap, evenly spread."""
    if not extents:
        return value
    cuts = tuple(
        slice(extent - length if at_end else 0, extent if at_end else length, max(1, length // each))
        for extent, length in zip(extents, lengths, strict=True)
    )
    return value[cuts[0]] if isinstance(value, (list, tuple)) else value[cuts]


def _parts(sample: Any) -> list[tuple[Any, Any]]:
    if isinstance(sample, dict):
        return list(sample.items())
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return list(zip(sample._fields, sample, strict=True))
    if isinstance(sample, (list, tuple)):
        return list(enumerate(sample))
    if is_dataclass(sample) and not isinstance(sample, type):
        return [(field.name, getattr(sample, field.name)) for field in fields(sample)]
    return []


def _is_array(value: Any) -> bool:
    """Whether it is an array of numbers as NumPy has them."""
    return hasattr(value, "tolist") and getattr(getattr(value, "dtype", None), "kind", "") in tuple("biuf")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and set(map(type, value)) <= {int, float, bool}
