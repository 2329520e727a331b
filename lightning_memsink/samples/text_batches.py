"""Whether the samples of a batch are texts, which are the same samples wherever they stand.

R  rows of a batch      T  tokens of a row
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.batch import leaves, tensors_in
from lightning_memsink.samples.documents import OF_THE_MODEL, text_in
from lightning_memsink.samples.tokens import unmasked

MOST = 64
"""Parts of a batch by which its kind is known, and kinds that are remembered."""


class TextBatches:
    """Says of a run's batches whether they are of texts, as the first one with the same parts shows it.

    A translation may by chance be as long as its text, and labels of one batch be no more than padding.
    """

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def has(self, batch: Any) -> bool:
        parts = tuple((path, tensor.ndim) for path, tensor in islice(leaves(batch), MOST))
        if parts not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[parts] = is_of_tokens(batch)
        return self._known[parts]


def is_of_tokens(batch: Any) -> bool:
    """Whether a batch is of tokens ``[B, T]`` and nothing else that makes a sample: no labels of whole rows, no images,
    and no other text to translate to."""
    text = text_in(batch)
    if text is None or text.ndim != 2 or text.dtype == torch.bool:
        return False
    if isinstance(batch, Mapping):
        labels = [batch[name] for name in ("labels", "label") if isinstance(batch.get(name), Tensor)]
        parts = [part for name, part in batch.items() if name not in OF_THE_MODEL and isinstance(part, Tensor)]
        return not any(_is_other(part, text) for part in parts) and all(_is_own(part, text) for part in labels)
    others = [tensor for tensor in tensors_in(batch) if tensor is not text]
    return all(_is_own(tensor, text) or _is_mask(tensor, text) for tensor in others)


def _is_other(part: Tensor, text: Tensor) -> bool:
    """Whether a tensor is something beside the text, an image say: real numbers, and no mask or weights of tokens."""
    if not part.is_floating_point() or part.ndim < 2 or part.shape == text.shape:
        return False
    return part.shape[1:].numel() > 1 and part.shape[-2:] != (text.shape[1], text.shape[1])


def _is_mask(part: Tensor, text: Tensor) -> bool:
    return part.shape == text.shape and not part.is_floating_point() and bool((part >= 0).all() and (part <= 1).all())


def _is_own(labels: Tensor, text: Tensor) -> bool:
    """Whether labels ``[R, T]`` are of the text: mostly its tokens or the next ones, or such that were masked in it."""
    if labels.shape != text.shape or labels.is_floating_point():
        return False
    counted = labels >= 0
    is_text, is_next = (labels == text)[counted], (labels[:, :-1] == text[:, 1:])[counted[:, :-1]]
    shares = [float(same.float().mean()) for same in (is_text, is_next) if len(same)]
    return not len(is_text) or max(shares) > 0.5 or unmasked(text, labels) is not text
