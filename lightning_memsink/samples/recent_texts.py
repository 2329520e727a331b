"""The tokens of the texts that came last, as many as fit."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_memsink.samples.tokens import Tokens


class RecentTexts:
    """A ring of tokens: a new text takes the place of the oldest ones. 4 bytes a token, and 12 a row of the table.

    Args:
        limit: tokens that fit.
    """

    def __init__(self, limit: int = 1 << 22) -> None:
        self.limit = limit
        self._ring: NDArray[np.int32] = np.zeros(min(limit, 1 << 16), dtype=np.int32)
        self._written = 0
        self._begin: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._length: NDArray[np.int32] = np.zeros(0, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        return self._ring.nbytes + self._begin.nbytes + self._length.nbytes

    def has(self, rows: Tensor) -> Tensor:
        """Bool ``[V]``: of which ``rows`` the text is here."""
        at = rows.numpy()
        found = np.zeros(len(at), dtype=bool)
        known = at < len(self._begin)
        begin, length = self._begin[at[known]], self._length[at[known]]
        found[known] = (length > 0) & (begin >= self._written - len(self._ring))
        return torch.from_numpy(found)

    def add(self, rows: Tensor, tokens: Tokens) -> None:
        """Adds the texts ``[V, T]`` of distinct ``rows`` ``[V]``, of which the last stay if not all fit."""
        at, mask = rows.numpy(), tokens.mask.numpy() != 0
        lengths = mask.sum(1)
        text = tokens.ids.numpy()[mask].astype(np.int32)  # one after the other, without padding
        while self._written + len(text) > len(self._ring) < self.limit:
            wider = np.zeros(min(self.limit, 2 * len(self._ring)), dtype=np.int32)
            wider[: len(self._ring)] = self._ring
            self._ring = wider
        if len(at) and int(at.max()) >= len(self._begin):
            more = max(int(at.max()) + 1, len(self._begin) * 3 // 2) - len(self._begin)
            self._begin, self._length = np.pad(self._begin, (0, more)), np.pad(self._length, (0, more))
        self._begin[at], self._length[at] = self._written + lengths.cumsum() - lengths, lengths
        places = np.arange(self._written, self._written + len(text))
        self._ring[places % len(self._ring)] = text  # of two tokens in one place the later stays
        self._written += len(text)

    def of(self, rows: Tensor) -> Tokens:
        """The texts ``[V, T]`` of ``rows`` ``[V]``, all of which are here, padded at the end."""
        at = rows.numpy()
        begin, length = self._begin[at], self._length[at]
        column = np.arange(int(length.max(initial=0)))
        mask = column < length[:, None]
        ids = np.where(mask, self._ring[(begin[:, None] + column) % len(self._ring)], 0)
        return Tokens(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask))
