"""Whether the samples of a batch are texts, which are the same samples wherever they stand.

R  rows of a batch      T  tokens of a row
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.batch import leaves, tensors_in
from lightning_memsink.samples.documents import OF_THE_MODEL, text_in
from lightning_memsink.samples.tokens import unmasked


class TextBatches:
    """Says of a run's batches whether they are of texts, as the first one with the same parts shows it.

    A translation may by chance be as long as its text, and labels of one batch be no more than padding.
    """

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def has(self, batch: Any) -> bool:
        if not isinstance(batch, Mapping):
            return is_of_tokens(batch)
        parts = tuple((path, tensor.ndim) for path, tensor in leaves(batch))
        if parts not in self._known:
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
        is_pictured = any(part.is_floating_point() and part.ndim > 1 and part.shape != text.shape for part in parts)
        return not is_pictured and all(tensor.shape == text.shape and _is_own(tensor, text) for tensor in labels)
    others = [tensor for tensor in tensors_in(batch) if tensor is not text]
    return all(tensor.shape == text.shape and not tensor.is_floating_point() for tensor in others)


def _is_own(labels: Tensor, text: Tensor) -> bool:
    """Whether labels ``[R, T]`` are of the text: mostly its tokens or the next ones, or such that were masked in it."""
    counted = labels >= 0
    is_text, is_next = (labels == text)[counted], (labels[:, :-1] == text[:, 1:])[counted[:, :-1]]
    if (
        not len(is_text)
        or float(is_text.float().mean()) > 0.5
        or (len(is_next) and float(is_next.float().mean()) > 0.5)
    ):
        return True
    return unmasked(text, labels) is not text
