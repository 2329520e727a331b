"""Detects that a data set changed since a checkpoint, so that ids name other samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_memsink.samples.hashing import content_ids
from lightning_memsink.samples.tokens import Tokens


class ContentCheck:
    """Content hashes of the first ``many`` samples of a run, compared after a resume.

    If most of them have other content after a resume, ids now name other samples. A sample whose content changes within
    one run (masked language modelling, augmentation) is not compared.
    """

    def __init__(self, many: int = 64) -> None:
        self.many = many
        self._content: dict[int, int] = {}
        self._restored: dict[int, int] = {}
        self._changed = self._same = 0

    def check(self, ids: Tensor, tokens: Tokens) -> str | None:
        """Compares a batch. Returns a warning once most restored samples that came again have changed, else None."""
        room = len(self._content) < self.many
        if not room and not self._restored:
            return None
        wanted = [n for n, sample in enumerate(ids.tolist()) if room or sample in self._restored]
        if not wanted:
            return None
        contents = content_ids({"input_ids": tokens.ids[wanted], "attention_mask": tokens.mask[wanted]})
        for n, content in zip(wanted, contents.tolist(), strict=True):
            sample = int(ids[n])
            known = self._restored.pop(sample, None)
            if known is not None:
                self._changed += known != content
                self._same += known == content
            if self._content.setdefault(sample, content) != content:
                del self._content[sample]
        if self._changed < 4 or self._changed < self._same:
            return None
        self._restored = {}
        return (
            "The data set changed since the checkpoint: the same sample ids now name other samples "
            f"({self._changed} of {self._changed + self._same} compared). Their history in the ledger belongs to the "
            "old ones. Resume with the old data set, use LossTracker(identity='content'), or start a new ledger."
        )

    def state_dict(self) -> dict[str, Any]:
        # Of a resumed run also those that have not come back yet: the next resume checks them.
        return {"content": self._restored | self._content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._content = {}
        self._restored = dict(state["content"])
        self._changed = self._same = 0
