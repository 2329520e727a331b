"""Where a collate function has joined its samples to one row, as padding-free collators do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.documents import Documents, text_in


def joined_lengths(samples: Any, batch: Any) -> list[int] | None:
    """How many tokens each sample has, if the batch's tokens are those of the samples' ``input_ids``, one sample after
    the other in their order; at the end there may be padding. None if they are not."""
    if not isinstance(samples, Sequence) or not samples or not isinstance(samples[0], Mapping):
        return None
    text = text_in(batch)
    if text is None or (text.ndim == 2 and len(text) != 1):
        return None
    parts = [_flat(sample.get("input_ids")) if isinstance(sample, Mapping) else None for sample in samples]
    known = [part for part in parts if part is not None and len(part)]
    if len(known) < len(samples):
        return None
    joined, tokens = torch.cat(known), text.reshape(-1).cpu().long()
    rest = tokens[len(joined) :]
    is_same = torch.equal(joined, tokens[: len(joined)]) and bool((rest == rest[:1]).all())
    return [len(part) for part in known] if is_same else None


def rows_of_documents(documents: Documents, index: Tensor, lengths: Tensor | None) -> Tensor | None:
    """``[D]``: the row of the data set that each document of a batch came from; None where that is unknown.

    Args:
        documents: of the batch. Several may have come in one row.
        index: ``[S]`` row of each sample that was fetched.
        lengths: ``[S]`` tokens of each, if they follow one another in the batch's only row (`joined_lengths`).
    """
    if lengths is None:
        is_row_each = documents.owners.ndim > 1 and len(index) == documents.row_count
        return index[documents.rows] if is_row_each else None
    return index[torch.bucketize(documents.first_places, lengths.cumsum(0), right=True).clamp(max=len(index) - 1)]


def _flat(ids: Any) -> Tensor | None:
    try:
        return torch.as_tensor(ids).long().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        return None
