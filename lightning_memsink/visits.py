"""One batch, as far as the ledger needs it, between the step that saw it and the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_memsink.tokens import Tokens


@dataclass(frozen=True)
class Visit:
    """``ids`` ``[B]``, ``losses`` ``[B]`` (NaN where none is known), the optimizer steps before it, and what samples
    are matched on: their text, and the user's features ``[B, F]``."""

    ids: Tensor
    losses: Tensor
    step: int
    tokens: Tokens | None
    features: Tensor | None

    @classmethod
    def restored(cls, plain: dict[str, Any]) -> Visit:
        """From what ``dataclasses.asdict`` made of one."""
        tokens = plain["tokens"]
        return cls(**{**plain, "tokens": None if tokens is None else Tokens(**tokens)})
