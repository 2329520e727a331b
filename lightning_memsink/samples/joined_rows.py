"""Whether a collate function has joined its samples to one row, as padding-free collators do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.documents import text_in


def are_joined(samples: Any, batch: Any) -> bool:
    """Whether the batch's tokens are those of the samples' ``input_ids``, one sample after the other in their order."""
    if not isinstance(samples, Sequence) or not samples or not isinstance(samples[0], Mapping):
        return False
    text = text_in(batch)
    if text is None or (text.ndim == 2 and len(text) != 1):
        return False
    parts = [_flat(sample.get("input_ids")) if isinstance(sample, Mapping) else None for sample in samples]
    known = [part for part in parts if part is not None and len(part)]
    return len(known) == len(samples) and torch.equal(torch.cat(known), text.reshape(-1).cpu().long())


def _flat(ids: Any) -> Tensor | None:
    try:
        return torch.as_tensor(ids).long().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        return None
