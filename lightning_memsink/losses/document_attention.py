"""Notices that tokens of one document attend to those of another in the same row: their losses depend on each other.

R  rows of a batch      T  tokens of a row
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
ATTENDS_ACROSS = (
    "Tokens of one document attend to those of another in the same row: a document's loss depends on its neighbours, "
    "which are others each time that rows are packed. To keep documents apart give the model a block-diagonal mask, or "
    "positions that start anew with each document (transformers' models make the mask of them under use_cache=False)."
)
SEEN = 1e-6
"""A weight of attention that counts as none is less."""
MASKED = -5e3
"""What is added to a score that counts as masked is less: -10,000 is usual, and biases by distance stay above."""


def row_owners(leaves: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
    """``[R, T]``: the owners of the first tensor that has one for each token of a row; None if there is none."""
    return next((owners for _, owners in leaves if owners.ndim == 2 and owners.shape[1] > 1), None)


def attends_across(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, owners: Tensor) -> bool:
    """Whether a call of the function ``name`` mixes tokens of different documents.

    It looks at torch's attention, at a softmax over ``[R, ..., T, T]`` scores, and at recurrent layers over a row;
    kernels of other libraries and code that is compiled are not looked into.
    """
    if name == "scaled_dot_product_attention":
        return _by_mask(args, kwargs, owners)
    if name == "softmax" and isinstance(result, Tensor) and result.ndim >= 3:
        return _overlaps(_one_head(result.detach(), owners) > SEEN, owners)
    first = args[0] if args else None
    return name in RECURRENT and isinstance(first, Tensor) and owners.shape[1] in first.shape[:2]


def _by_mask(args: Sequence[Any], kwargs: Mapping[str, Any], owners: Tensor) -> bool:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, mask, is_causal = given["query"], given.get("attn_mask"), given.get("is_causal", False)
    length = owners.shape[1]
    if query.shape[-2] != length or given["key"].shape[-2] != length:
        return False
    allowed = torch.ones(1, length, length, dtype=torch.bool)
    if isinstance(mask, Tensor):
        seen = mask.detach() if mask.dtype == torch.bool else mask.detach() > MASKED
        allowed = _one_head(seen, owners)
    return _overlaps(allowed.tril() if is_causal else allowed, owners)


def _one_head(scores: Tensor, owners: Tensor) -> Tensor:
    """``[R or 1, T, T]`` of ``[..., T, T]``, those of one head; no rows where they are of another extent."""
    rows, length = owners.shape
    if scores.ndim < 2 or scores.shape[-2:] != (length, length):
        return scores.new_zeros(0, length, length)
    flat = scores.reshape(-1, length, length)
    if len(flat) % rows == 0:
        flat = flat[:: len(flat) // rows]
    return flat if len(flat) == rows else flat[:1]


def _overlaps(seen: Tensor, owners: Tensor) -> bool:
    """Whether a token sees one of another document."""
    if not len(seen):
        return False
    owners = owners.to(seen.device)
    known = (owners >= 0)[:, :, None] & (owners >= 0)[:, None, :]
    return bool((seen.bool() & known & (owners[:, :, None] != owners[:, None, :])).any())
