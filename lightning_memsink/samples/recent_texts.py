"""The tokens of the texts that came last, as many as fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_memsink.samples.tokens import Tokens


class RecentTexts:
    """A ring of tokens: a new text takes the place of the oldest ones. 4 bytes a token, and some 200 a text in it.

    Args:
        limit: tokens that fit.
    """

    def __init__(self, limit: int = 1 << 22) -> None:
        self.limit = limit
        self._ring: NDArray[np.int32] = np.zeros(min(limit, 1 << 16), dtype=np.int32)
        self._written = 0
        self._places: dict[int, tuple[int, int]] = {}  # begin and length by row, the oldest first

    def has(self, rows: Tensor) -> Tensor:
        """Bool ``[V]``: of which ``rows`` the text is here."""
        return torch.tensor([row in self._places for row in rows.tolist()], dtype=torch.bool)

    def add(self, rows: Tensor, tokens: Tokens) -> None:
        """Adds the texts ``[V, T]`` of distinct ``rows`` ``[V]``, of which the last stay if not all fit."""
        mask = tokens.mask.numpy() != 0
        lengths = mask.sum(1)
        text = tokens.ids.numpy()[mask].astype(np.int32)  # one after the other, without padding
        while self._written + len(text) > len(self._ring) < self.limit:
            wider = np.zeros(min(self.limit, 2 * len(self._ring)), dtype=np.int32)
            wider[: len(self._ring)] = self._ring
            self._ring = wider
        begins = self._written + lengths.cumsum() - lengths
        for row, begin, length in zip(rows.tolist(), begins.tolist(), lengths.tolist(), strict=True):
            self._places.pop(row, None)
            if length:
                self._places[row] = begin, length
        places = np.arange(self._written, self._written + len(text))
        self._ring[places % len(self._ring)] = text  # of two tokens in one place the later stays
        self._written += len(text)
        while self._places and next(iter(self._places.values()))[0] < self._written - len(self._ring):
            del self._places[next(iter(self._places))]

    def of(self, rows: Tensor) -> Tokens:
        """The texts ``[V, T]`` of ``rows`` ``[V]``, all of which are here, padded at the end."""
        found = np.array([self._places[row] for row in rows.tolist()], dtype=np.int64).reshape(-1, 2)
        begin, length = found[:, 0], found[:, 1]
        column = np.arange(int(length.max(initial=0)))
        mask = column < length[:, None]
        ids = np.where(mask, self._ring[(begin[:, None] + column) % len(self._ring)], 0)
        return Tokens(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types. It holds texts: a checkpoint is as confidential as the data."""
        places = torch.tensor([[row, *place] for row, place in self._places.items()], dtype=torch.int64)
        used = min(self._written, len(self._ring))
        return {
            "ring": torch.from_numpy(self._ring[:used].copy()),
            "size": len(self._ring),
            "written": self._written,
            "places": places.reshape(-1, 3),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a `state_dict`; an empty one forgets all texts."""
        self._ring = np.zeros(state.get("size", min(self.limit, 1 << 16)), dtype=np.int32)
        ring = state.get("ring", torch.zeros(0)).numpy()
        self._ring[: len(ring)] = ring
        self._written = state.get("written", 0)
        self._places = {row: (begin, length) for row, begin, length in state.get("places", torch.zeros(0, 3)).tolist()}
