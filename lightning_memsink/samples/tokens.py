"""The token ids of a batch, and which of them are padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_memsink.samples.batch import tensors_in


@dataclass(frozen=True)
class Tokens:
    """The text of a batch: ``ids`` is ``[B, T]`` int64; ``mask`` is ``[B, T]`` bool, False where padded."""

    ids: Tensor
    mask: Tensor


def tokens_of(batch: Any, axes: Sequence[int] | None = None) -> Tokens | None:
    """The tokens of a batch, or None if it holds no text.

    Text is ``batch["input_ids"]`` of a mapping (so of a ``BatchEncoding``), a bare ``[B, T]`` integer tensor, or one
    that comes first in a tuple or list, as in ``(x, y)``. Padding is known from a mapping's ``attention_mask`` of the
    same shape; a mask of another shape (packed, 4-D) is ignored, and where there is none, what follows the last of a
    text's ``labels`` is padding. Tokens that were masked to be predicted are put back from the ``labels``. A tensor
    whose samples lie along its second axis, by ``axes`` (see `samples.batch_rows.rows_of`), is turned.
    """
    if isinstance(batch, Mapping):
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    else:
        ids, mask = (batch[0] if isinstance(batch, (tuple, list)) and batch else batch), None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not _is_integer(ids.dtype):
        return None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.is_cpu and ids.is_cpu and torch.equal(labels, ids):
        labels = None  # the text itself says nothing more of it
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = _until_last_label(ids, labels)
    ids = unmasked(ids, labels)
    if axes is not None and 1 in axes and _axis_of(ids, batch, axes) == 1:
        ids, mask = ids.T, mask.T
    return Tokens(ids.long(), mask != 0)


def unmasked(ids: Tensor, labels: Any) -> Tensor:
    """The text as it was before tokens were masked at random for a model to predict: another place each time.

    It was masked where ``ids`` that differ from ``labels`` are mostly one and the same token, or a good part of them
    one that stands nowhere else: of a few tokens, most may have been replaced by others at random. Labels that are the
    next tokens differ as well.
    """
    if not isinstance(labels, Tensor) or labels.shape != ids.shape or labels.is_floating_point():
        return ids
    counted = labels >= 0
    is_replaced = counted & (labels != ids)
    replaced = ids[is_replaced]
    if not len(replaced):
        return ids
    followed = counted[..., :-1]
    is_next = labels[..., :-1] == ids[..., 1:]
    if bool(followed.any()) and bool((is_next | ~followed).all()):
        return ids
    mask = replaced.mode().values
    share = float((replaced == mask).float().mean())
    is_alone = not bool((ids[~is_replaced] == mask).any() | (labels == mask).any())
    return torch.where(counted, labels.to(ids.dtype), ids) if share > 0.5 or (is_alone and share >= 0.25) else ids


def _until_last_label(ids: Tensor, labels: Any) -> Tensor:
    """Bool ``[B, T]``: up to the last token that has a loss, where ``labels`` are the text or its next tokens.

    A row without any loss is whole.
    """
    mask = torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(labels, Tensor) or labels.shape != ids.shape or labels.is_floating_point():
        return mask
    counted = labels >= 0
    is_next = bool(((labels[:, :-1] == ids[:, 1:]) | ~counted[:, :-1]).all()) and not bool(counted[:, -1:].any())
    if bool(counted.all()) or not (is_next or bool((labels == ids)[counted].all())):
        return mask
    places = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(counted, places + int(is_next), -1).amax(1, keepdim=True)
    return mask & ((places <= last) | (last < 0))


def _axis_of(tensor: Tensor, batch: Any, axes: Sequence[int]) -> int | None:
    """The entry of ``axes`` of a tensor of the batch."""
    tensors = list(tensors_in(batch))
    place = next((n for n, other in enumerate(tensors) if other is tensor), None)
    return axes[place] if place is not None and len(tensors) == len(axes) else None


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def stack(texts: Sequence[Tokens]) -> Tokens:
    """Several batches of text, at least one, as one, padded to the longest."""
    width = max(text.ids.shape[1] for text in texts)
    ids, masks = (
        torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])
        for tensors in ([text.ids for text in texts], [text.mask for text in texts])
    )
    return Tokens(ids, masks)


def joined_by_width(texts: Sequence[Tokens]) -> list[Tokens]:
    """Batches of text, those of one width that follow one another as one: torch takes longer for each call than for
    the few tokens of a batch."""
    runs = (list(run) for _, run in groupby(texts, lambda text: text.ids.shape[1]))
    return [Tokens(torch.cat([text.ids for text in run]), torch.cat([text.mask for text in run])) for run in runs]
