"""A short hash of the input of each sample of a batch, by which a training sample is known again among the controls.

Labels don't count: a model that was trained on an input does not meet it for the first time, whatever label it had.

B  samples of a batch      N  elements of a sample      K  elements hashed of it
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_memsink.samples.batch import is_list, leaves
from lightning_memsink.samples.hashing import splitmix64
from lightning_memsink.samples.tokens import Tokens, tokens_of

ELEMENTS = 64
"""Hashed of each tensor of a sample: all, or so many at even distances."""
DISTINCT = 6
"""Different values among them by which a sample is known; a row of zeros and a few ones is like many others."""
LABELS = frozenset("y label labels target targets class classes".split())
NO_PRINT = 0
_SMALL = 8
"""A tensor with fewer elements than the largest by this factor is no input."""
_BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class _Part(NamedTuple):
    """A tensor with a row for each sample."""

    path: tuple[Any, ...]
    rows: Tensor
    elements: int
    """Of a sample."""


def input_prints(batch: Any, size: int, axes: Sequence[Any] | None = None, named_only: bool = False) -> Tensor | None:
    """``[B]`` int64 hashes of the inputs of samples; None where there are none in host memory.

    Equal inputs have equal hashes in every batch and process. Inputs that differ have equal ones only if they differ in
    none of the elements that are hashed. Of text the tokens that are not padding count. Of other batches these are no
    inputs: tensors named as labels, the last of a tuple if it is no larger than the others, a single integer of each
    sample where there is more, and what is less than an eighth of the largest.

    Args:
        batch: anything that a data loader yields. What is on a device is not waited for.
        size: B.
        axes: where the samples lie in each tensor, as `samples.batch_rows.rows_of` takes them.
        named_only: give a sample `NO_PRINT` where its elements are like those of many others. It takes longer.
    """
    parts = _parts(batch, size, axes)
    if not parts:
        return None
    text = tokens_of(batch, [entry for entry in axes if isinstance(entry, int)] if axes else None)
    if text is not None and len(text.ids) == size and text.ids.numel():
        return text_prints(text, named_only)
    prints = np.zeros(size, dtype=np.int64)
    is_known = np.full(size, not named_only)
    for part in _inputs(batch, parts):
        taken = _spread(part.rows, part.elements)
        prints = prints * 3 + _hashes(taken)
        if named_only:
            is_known |= _names(taken) if taken.shape[1] < part.elements else True
    if named_only and size > 1:
        is_known &= (prints != prints[0]).any()  # an input that is always the same is none
    return torch.from_numpy(np.where(is_known, prints, NO_PRINT))


def text_prints(text: Tokens, named_only: bool = False) -> Tensor:
    """``[B]`` int64 of texts, by their length and up to `ELEMENTS` tokens at even distances."""
    ids, mask = text.ids.numpy(), text.mask.numpy()
    lengths = mask.sum(1, keepdims=True)
    start = mask.argmax(1)[:, None]
    places = start + _places() * lengths // ELEMENTS
    taken = np.take_along_axis(ids, np.minimum(places, ids.shape[1] - 1), 1)
    lengths = lengths[:, 0]
    prints = _hashes(taken) + lengths * _weights(1)[0]
    if named_only:
        prints = np.where((lengths > 0) & ((lengths <= ELEMENTS) | _names(taken)), prints, NO_PRINT)
    return torch.from_numpy(prints)


def _parts(batch: Any, size: int, axes: Sequence[Any] | None) -> list[_Part]:
    """The tensors that have a row for each sample; none if a tensor is not in host memory."""
    found = list(leaves(batch))
    if any(tensor.device.type != "cpu" for _, tensor in found):
        return []
    entries = axes if axes is not None and len(axes) == len(found) else [-1] * len(found)
    parts = []
    for (path, tensor), entry in zip(found, entries, strict=True):
        if not isinstance(entry, int) or entry < -1 or tensor.layout is not torch.strided or tensor.is_nested:
            continue
        axis = max(entry, 0)
        if tensor.ndim > axis and tensor.shape[axis] == size and tensor.numel():
            parts.append(_Part(path, tensor.movedim(axis, 0) if axis else tensor, tensor.numel() // size))
    return parts


def _inputs(batch: Any, parts: list[_Part]) -> list[_Part]:
    largest = max(part.elements for part in parts)
    kept = [part for part in parts if part.elements * _SMALL >= largest]
    if largest > 1:
        kept = [part for part in kept if part.elements > 1 or _is_real(part.rows)]
    inputs = [part for part in kept if not _is_label(batch, part, kept)]
    if sum(part.elements for part in inputs) == 1 and not _is_real(inputs[0].rows):  # it may be the number of a row
        return kept
    return inputs or kept


def _is_label(batch: Any, part: _Part, parts: list[_Part]) -> bool:
    if not part.path:
        return False
    if not is_list(batch):
        return str(part.path[0]).lower() in LABELS
    others = [other.elements for other in parts if other.path[0] != part.path[0]]
    return part.path[0] == len(batch) - 1 and part.elements <= max(others, default=0)


def _spread(rows: Tensor, count: int) -> NDArray[Any]:
    """``[B, K]``: all elements of rows ``[B, ...]``, or `ELEMENTS` of them at even distances; as numbers that have the
    same bits if they are equal."""
    rows = rows.detach()
    if rows.is_complex():
        rows, count = torch.view_as_real(rows), 2 * count
    if rows.dtype == torch.bool or rows.dtype == torch.bfloat16 or rows.dtype.itemsize not in _BITS:
        rows = rows.float()
    flat = rows.reshape(len(rows), -1)
    step = max(1, count // ELEMENTS)
    taken = flat if count <= ELEMENTS else flat[:, step // 2 :: step][:, :ELEMENTS]
    return taken.numpy() + 0  # turns -0.0 into 0.0


def _hashes(taken: NDArray[Any]) -> NDArray[np.int64]:
    """``[B]``: the bits of elements ``[B, K]``, summed with odd weights that wrap."""
    words = taken.view(_BITS[taken.dtype.itemsize]).astype(np.int64)
    weights = _weights(words.shape[1] + 1)
    hashes: NDArray[np.int64] = words @ weights[1:] + weights[0]
    return hashes


def _names(taken: NDArray[Any]) -> NDArray[np.bool_]:
    """Bool ``[B]``: elements ``[B, K]`` that have enough different values to name a sample."""
    ranked = np.sort(taken, 1)
    named: NDArray[np.bool_] = (ranked[:, 1:] != ranked[:, :-1]).sum(1) >= DISTINCT - 1
    return named


@lru_cache(maxsize=256)
def _weights(count: int) -> NDArray[np.int64]:
    weights: NDArray[np.int64] = (splitmix64(torch.arange(1, count + 1) * -0x61C8864680B583EB) | 1).numpy()
    return weights


@lru_cache(maxsize=1)
def _places() -> NDArray[np.int64]:
    return np.arange(ELEMENTS)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
