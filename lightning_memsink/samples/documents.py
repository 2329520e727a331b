"""The documents that the rows of a batch of tokens are made of, where rows hold several.

R  rows of a batch      T  tokens of a row      D  documents of a batch      L  tokens of the longest one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.batch import leaves
from lightning_memsink.samples.batch_rows import Entry
from lightning_memsink.samples.tokens import Tokens, unmasked

NUMBERED = ("document_ids", "sequence_ids", "seq_idx")
"""Names under which a batch numbers the document of each token."""
ENDS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
"""Names of the places, 0 first, at which documents begin in the rows one after the other."""
OF_THE_MODEL = ("attention_mask", "position_ids", "token_type_ids", *NUMBERED, *ENDS)
OF_NO_DOCUMENT = -1
COUNTS_FOR_NONE = -2
"""The owner of a target that counts for no document, whatever it is computed with."""
IGNORED = -100

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

    @property
    def rows(self) -> Tensor:
        """``[D]`` int64: the row that each document lies in."""
        rows = torch.zeros(self.count, dtype=torch.int64)
        if self.owners.ndim > 1:
            row, _ = (self.owners >= 0).nonzero(as_tuple=True)
            rows[self.owners[self.owners >= 0]] = row
        return rows

    @property
    def is_one_a_row(self) -> bool:
        """Whether no row has more than one document."""
        rows = self.rows
        return len(torch.unique(rows)) == self.count and self.owners.ndim > 1

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
    named = _named(batch, text, key)
    if named is None:
        return None
    numbers, name = named
    if name in (*NUMBERED, *ENDS, "position_ids"):
        numbers = _without_padding(numbers, text, batch.get("labels"))
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


def _named(batch: Any, text: Tensor, key: str) -> tuple[Tensor, str] | None:
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


def _without_padding(numbers: Tensor, text: Tensor, labels: Any) -> Tensor:
    """A row's end where each token has a number of its own is padding: two tokens or more that are the same and have no
    loss, or one that is what others are padded with."""
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[..., 1:] = numbers[..., 1:] != numbers[..., :-1]
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


def _padding(batch: Any, text: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == text.shape:
        return mask.detach().cpu() == 0
    return torch.zeros(text.shape, dtype=torch.bool)


def _numbered(numbers: Tensor, found_in: str) -> Documents:
    """Documents 0..D-1, in the order in which the rows begin them; equal numbers in two rows are two documents."""
    by_row = numbers if numbers.ndim == 2 else numbers[None]
    begins = torch.ones_like(by_row, dtype=torch.bool)
    begins[:, 1:] = by_row[:, 1:] != by_row[:, :-1]
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
    owners = documents.owners.reshape(-1)
    keys = torch.zeros(documents.count, dtype=torch.int64)
    keys[owners[owners >= 0]] = numbers.detach().cpu().reshape(-1)[owners >= 0].long()
    return Documents(documents.owners, documents.count, documents.found_in, keys)


def _of_targets(targets: Tensor, text: Tensor, owners: Tensor) -> Tensor:
    """``owners`` without the tokens that no document by itself would predict.

    That is the first one of each document, where targets are the text itself and the model shifts them; and where they
    are the next tokens already, what a document's last token predicts of another one.
    """
    ids, targets = text.detach().cpu(), targets.detach().cpu()
    counted = (targets != IGNORED) & (owners >= 0)
    is_text = bool((targets == ids)[counted].all())
    begins = torch.ones_like(owners, dtype=torch.bool)
    begins[..., 1:] = owners[..., 1:] != owners[..., :-1]
    if is_text and bool(counted.any()):
        return torch.where(begins & (owners >= 0), COUNTS_FOR_NONE, owners)
    within = counted[..., :-1] & ~begins[..., 1:]
    is_next = targets[..., :-1] == ids[..., 1:]
    if not bool(within.any()) or not bool(is_next[within].all()):
        return owners
    crosses = torch.zeros_like(begins)
    crosses[..., :-1] = begins[..., 1:] & is_next
    return torch.where(crosses, COUNTS_FOR_NONE, owners)
