"""Counts texts that come under several ids: their visits are then counted apart, and their memorization seems less.

V  visits
"""

from __future__ import annotations

from torch import Tensor

from lightning_memsink.samples.hashing import text_ids
from lightning_memsink.samples.tokens import Tokens


class SharedTexts:
    """Of the first ``many`` texts of a run, those with ids of their owner's or of rows."""

    def __init__(self, many: int = 1 << 16) -> None:
        self.many = many
        self._id_of: dict[int, int] = {}
        self._ids_of: dict[int, set[int]] = {}
        self._is_said = False

    def note(self, ids: Tensor, tokens: Tokens) -> None:
        """Notes visits: ``ids`` ``[V]``."""
        if self._is_said or not len(ids):
            return
        first_text = text_ids(Tokens(tokens.ids[:1], tokens.mask[:1]))
        if int(first_text) == int(ids[0]):  # ids are the texts' own
            return
        texts = text_ids(tokens)
        apart = (texts != ids).nonzero().flatten()
        for text, id in zip(texts[apart].tolist(), ids[apart].tolist(), strict=True):
            first = self._id_of.get(text)
            if first is None and len(self._id_of) < self.many:
                self._id_of[text] = id
            elif first is not None and first != id:
                self._ids_of.setdefault(text, {first}).add(id)

    def said(self) -> str | None:
        """At the end of an epoch: what was found, once; None if there is nothing to say."""
        if self._is_said or not self._ids_of:
            return None
        self._is_said = True
        most = max(map(len, self._ids_of.values()))
        more = "at least " if len(self._id_of) >= self.many else ""
        ids = {id for some in self._ids_of.values() for id in some}
        return (
            f"{more}{len(self._ids_of)} texts come under several ids, {len(ids)} ids together (one text under {most}): "
            "their visits and verdicts are counted apart. With LossTracker(identity='content') equal texts are one "
            "sample."
        )
