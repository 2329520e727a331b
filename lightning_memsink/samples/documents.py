"""The documents that the rows of a batch of tokens are made of, where rows hold several.

R  rows of a batch      T  tokens of a row      D  documents of a batch      L  tokens of the longest one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.batch import leaves
from lightning_memsink.samples.batch_rows import Entry
from lightning_memsink.samples.document_numbers import (
    ENDS,
    IGNORED,
    NUMBERED,
    OF_NO_DOCUMENT,
    begins_in,
    numbers_in,
    without_padding,
)
from lightning_memsink.samples.tokens import Tokens, unmasked

OF_THE_MODEL = ("attention_mask", "position_ids", "token_type_ids", *NUMBERED, *ENDS)
COUNTS_FOR_NONE = -2
"""The owner of a target that counts for no document, whatever it is computed with."""

Segments = Callable[[Any], Tensor]
"""``segments(batch) -> [R, T]``: integers, the same for the tokens of a document within its row; negative for none."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch, numbered as they are read: row after row."""

    owners: Tensor
    """``[R, T]`` (or ``[N]``, if the batch has no axis of rows) int64 on the CPU: the document of each token, -1 for
    padding."""
    count: int
    """D."""
    found_in: str
    """What of the batch they were found in: ``position_ids``, say."""
    keys: Tensor | None = None
    """``[D]`` the number that the batch gives each document, where it numbers tokens under the ids' own key."""

    @cached_property
    def first_places(self) -> Tensor:
        """``[D]`` int64: where each document's first token is among all tokens, row after row."""
        owners = self.owners.reshape(-1)
        places = (owners >= 0).nonzero().flatten()
        return torch.full((self.count,), len(owners)).scatter_reduce(0, owners[places], places, "amin")

    @cached_property
    def rows(self) -> Tensor:
        """``[D]`` int64: the row that each document lies in."""
        return self.first_places // max(1, self.owners.shape[-1])

    @property
    def row_count(self) -> int:
        """R."""
        return len(self.owners) if self.owners.ndim > 1 else 1

    @property
    def is_one_a_row(self) -> bool:
        """Whether no row has more than one document."""
        return len(torch.unique(self.rows)) == self.count and self.owners.ndim > 1

    def given_by_row(self, value: Any) -> list[Any] | None:
        """Things that are given as a list for each row, in the order of documents; None if ``value`` is no such lists,
        one thing a document."""
        if not isinstance(value, (list, tuple)) or len(value) != self.row_count:
            return None
        if not all(isinstance(part, (list, tuple, Tensor)) for part in value):
            return None
        sizes = [len(part) if not isinstance(part, Tensor) or part.ndim else 0 for part in value]
        if sizes != torch.bincount(self.rows, minlength=self.row_count).tolist():
            return None
        return [thing for part in value for thing in (part.tolist() if isinstance(part, Tensor) else part)]

    def texts(self, ids: Tensor) -> Tokens:
        """``[D, L]``: each document by itself, padded at the end, of the batch's tokens ``[R, T]``."""
        owners = self.owners.reshape(-1)
        places = (owners >= 0).nonzero().flatten()
        places = places[owners[places].argsort(stable=True)]
        own = owners[places]
        lengths = torch.bincount(own, minlength=self.count)
        column = torch.arange(len(own)) - (lengths.cumsum(0) - lengths)[own]
        width = int(lengths.max()) if self.count else 0
        texts = torch.zeros(self.count, width, dtype=torch.int64)
        texts[own, column] = ids.detach().cpu().reshape(-1)[places].long()
        return Tokens(texts, torch.arange(width) < lengths[:, None])

    def by_token(self, values: Tensor, otherwise: float = 0) -> Tensor:
        """``values`` ``[D]`` of documents as those of their tokens, in the shape of ``owners``."""
        return torch.cat([values, values.new_full((1,), otherwise)])[self.owners]

    def axes(self, batch: Any) -> list[Entry]:
        """For `samples.batch_rows.rows_of`: the document of each element of the batch's tensors, None if unknown.

        None also for masks and positions, which only the model reads.
        """
        text = text_in(batch)
        return [
            None if path and path[-1] in OF_THE_MODEL else self._entry(tensor, text) for path, tensor in leaves(batch)
        ]

    def _entry(self, tensor: Tensor, text: Tensor | None) -> Entry:
        if tensor.is_nested or not tensor.ndim:
            return None
        rank = self.owners.ndim
        if tensor.shape[:rank] != self.owners.shape:
            by_document = tensor.shape[0] == self.count and self.count != self.owners.shape[0]
            return torch.arange(self.count).reshape(-1, *[1] * (tensor.ndim - 1)) if by_document else None
        owners = self.owners
        if text is not None and tensor.shape == text.shape and not tensor.is_floating_point():
            owners = _of_targets(tensor, text, owners)
        return owners.reshape(*owners.shape, *[1] * (tensor.ndim - rank))


def documents_in(
    batch: Any, key: str = "sample_id", segments: Segments | None = None, length: int | None = None
) -> Documents | None:
    """The documents of a batch; None if each row is one, or nothing in the batch says more.

    Documents are found, in this order, by the user's function, in numbers of tokens under the ids' key, in
    ``document_ids`` and its like, in the places at which documents begin (``cu_seq_lens``), in an attention mask that
    is block-diagonal or numbers documents, and in ``position_ids`` that start anew. Padding is known from an attention
    mask ``[R, T]``, from negative numbers, and from a row's end where each position starts anew.

    Args:
        batch: what training_step gets.
        key: where the batch may hold the ids of the user's own.
        segments: the user's function.
        length: of the text in a batch of one row, if the loader knows it. The rest is padding.

    Raises:
        ValueError: ``segments`` returns no integers ``[R, T]``.
    """
    text = text_in(batch)
    if segments is not None:
        return _of_function(batch, text, segments)
    if text is None:
        return None
    if not text.numel():
        return Documents(torch.zeros(text.shape, dtype=torch.int64), 0, "input_ids") if _is_joined(batch) else None
    named = numbers_in(batch, text, key)
    if named is None:
        return None
    numbers, name = named
    if name in (*NUMBERED, *ENDS, "position_ids"):
        numbers = without_padding(numbers, text, batch.get("labels"))
    padding = _padding(batch, text)
    if length is not None:
        padding.view(-1)[length:] = True
    documents = _numbered(torch.where(padding, OF_NO_DOCUMENT, numbers), name)
    if name == key:
        return _with_keys(documents, batch[key])
    says_more = not documents.count or not documents.is_one_a_row or bool(((documents.owners < 0) & ~padding).any())
    return documents if says_more else None


def text_in(batch: Any) -> Tensor | None:
    """The tokens of a batch as it has them: ``[R, T]``, or ``[N]`` of rows joined without an axis of their own."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None and not isinstance(batch, Mapping):
        ids = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(ids, Tensor) or ids.is_nested or ids.ndim not in (1, 2) or ids.is_floating_point():
        return None
    return ids if ids.ndim == 2 or isinstance(batch, Mapping) else None


def whole_text_in(batch: Any) -> Tensor | None:
    """`text_in`, with tokens put back that were masked to be predicted."""
    text = text_in(batch)
    return unmasked(text, batch.get("labels")) if text is not None and isinstance(batch, Mapping) else text


def _of_function(batch: Any, text: Tensor | None, segments: Segments) -> Documents:
    found = segments(batch)
    name = getattr(segments, "__name__", type(segments).__name__)
    fits = isinstance(found, Tensor) and not found.is_floating_point() and found.ndim in (1, 2)
    if not fits or (text is not None and found.shape != text.shape):
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        wanted = "[R, T]" if text is None else str(list(text.shape))
        raise ValueError(
            f"{name}(batch), given as segments=, returned {got}. Return integers {wanted}: a number for the document "
            "of each token, negative for padding."
        )
    return _numbered(found.detach().cpu().long(), name)


def _is_joined(batch: Any) -> bool:
    """Whether a batch is of the kind that has no padding, and no rows either."""
    return isinstance(batch, Mapping) and any(name in batch for name in (*ENDS, *NUMBERED, "position_ids"))


def _padding(batch: Any, text: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == text.shape:
        return mask.detach().cpu() == 0
    return torch.zeros(text.shape, dtype=torch.bool)


def _numbered(numbers: Tensor, found_in: str) -> Documents:
    """Documents 0..D-1, in the order in which the rows begin them; equal numbers in two rows are two documents."""
    by_row = numbers if numbers.ndim == 2 else numbers[None]
    begins = begins_in(by_row)
    row, column = begins.nonzero(as_tuple=True)  # of each run of equal numbers, of which there are few
    runs = list(zip(row.tolist(), by_row[row, column].tolist(), strict=True))
    ranks: dict[tuple[int, int], int] = {}
    for run in runs:
        if run[1] >= 0:
            ranks.setdefault(run, len(ranks))
    owner_of_run = torch.tensor([ranks.get(run, OF_NO_DOCUMENT) for run in runs], dtype=torch.int64)
    owners = owner_of_run[begins.reshape(-1).long().cumsum(0) - 1] if runs else torch.zeros(0, dtype=torch.int64)
    return Documents(owners.reshape(numbers.shape), len(ranks), found_in)


def _with_keys(documents: Documents, numbers: Tensor) -> Documents:
    return replace(documents, keys=numbers.detach().cpu().reshape(-1)[documents.first_places].long())


def _of_targets(targets: Tensor, text: Tensor, owners: Tensor) -> Tensor:
    """``owners`` without the tokens that no document by itself would predict.

    That is the first one of each document, where targets are the text itself and the model shifts them; and where they
    are the next tokens already, what a document's last token predicts of another one.
    """
    ids, targets = text.detach().cpu(), targets.detach().cpu()
    counted = (targets != IGNORED) & (owners >= 0)
    is_text = bool((targets == ids)[counted].all())
    begins = begins_in(owners)
    if is_text and bool(counted.any()):
        return torch.where(begins & (owners >= 0), COUNTS_FOR_NONE, owners)
    within = counted[..., :-1] & ~begins[..., 1:]
    is_next = targets[..., :-1] == ids[..., 1:]
    if not bool(within.any()) or not bool(is_next[within].all()):
        return owners
    crosses = torch.zeros_like(begins)
    crosses[..., :-1] = begins[..., 1:] & is_next
    return torch.where(crosses, COUNTS_FOR_NONE, owners)
