"""The number of the document that each token of a batch is of, as the batch says it.

R  rows of a batch      T  tokens of a row
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NUMBERED = ("document_ids", "sequence_ids", "seq_idx")
"""Names under which a batch numbers the document of each token."""
ENDS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
"""Names of the places, 0 first, at which documents begin in the rows one after the other."""
OF_NO_DOCUMENT = -1
IGNORED = -100


def numbers_in(batch: Any, text: Tensor, key: str) -> tuple[Tensor, str] | None:
    """Numbers of the documents of tokens, and the name of what says them."""
    if not isinstance(batch, Mapping):
        return None
    for name in (key, *NUMBERED):
        numbers = _whole_numbers(batch.get(name), text.shape)
        if numbers is not None:
            return numbers, name
    for name in ENDS:
        ends = batch.get(name)
        if isinstance(ends, Tensor) and ends.ndim == 1 and len(ends) > 1 and int(ends[-1]) <= text.numel():
            places = torch.arange(text.numel()).reshape(text.shape)
            numbers = torch.bucketize(places, ends.detach().cpu().long(), right=True) - 1
            return torch.where(places < int(ends[-1]), numbers, OF_NO_DOCUMENT), name
    numbers = _of_mask(batch.get("attention_mask"), text)
    if numbers is not None:
        return numbers, "attention_mask"
    positions = _whole_numbers(batch.get("position_ids"), text.shape)
    return None if positions is None else (_of_positions(positions), "position_ids")


def _whole_numbers(value: Any, shape: torch.Size) -> Tensor | None:
    """``value`` on the CPU, if it has an integer for each token."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_floating_point() or value.shape != shape:
        return None
    return None if value.dtype == torch.bool else value.detach().cpu().long()


def _of_mask(mask: Any, text: Tensor) -> Tensor | None:
    """Of a mask whose numbers are those of documents, or in which no token sees another document's."""
    numbers = _whole_numbers(mask, text.shape)
    if numbers is not None:
        return torch.where(numbers > 0, numbers, OF_NO_DOCUMENT) if int(numbers.max()) > 1 else None
    if not isinstance(mask, Tensor) or text.ndim != 2 or mask.shape[-2:] != (text.shape[1], text.shape[1]):
        return None
    rows = len(text)
    if mask.ndim not in (3, 4) or mask.shape[0] != rows:
        return None
    seen = mask.detach()[:, 0] if mask.ndim == 4 else mask.detach()
    seen = (seen >= 0 if seen.is_floating_point() and bool((seen < 0).any()) else seen > 0).cpu()
    begins = ~seen.diagonal(-1, 1, 2) & ~seen.diagonal(1, 1, 2)  # [R, T - 1]: neither of two neighbours sees the other
    numbers = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), begins.long()], 1).cumsum(1)
    across = seen & (numbers[:, :, None] != numbers[:, None, :])
    is_alone = ~seen.any(2)
    return None if bool(across.any()) else torch.where(is_alone, OF_NO_DOCUMENT, numbers)


def _of_positions(positions: Tensor) -> Tensor:
    """A document begins where positions don't go on."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[..., 1:] = positions[..., 1:] <= positions[..., :-1]
    return begins.long().cumsum(-1)


def begins_in(numbers: Tensor) -> Tensor:
    """Bool, of the same shape: where a row begins, or goes on with another number."""
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[..., 1:] = numbers[..., 1:] != numbers[..., :-1]
    return begins


def without_padding(numbers: Tensor, text: Tensor, labels: Any) -> Tensor:
    """A row's end where each token has a number of its own is padding: two tokens or more that are the same and have no
    loss, or one that is what others are padded with."""
    begins = begins_in(numbers)
    ends = torch.cat([begins[..., 1:], torch.ones_like(begins[..., :1])], -1)
    single = begins & ends
    ids = text.detach().cpu()
    if isinstance(labels, Tensor) and labels.shape == text.shape:
        single &= labels.detach().cpu() == IGNORED
    single &= ids == ids[..., -1:]
    trailing = single.flip(-1).long().cumprod(-1).flip(-1).bool()
    is_padded = trailing.sum(-1, keepdim=True) > 1
    is_padded |= torch.isin(ids[..., -1:], ids[..., -1:][is_padded])
    return torch.where(trailing & is_padded, OF_NO_DOCUMENT, numbers)
