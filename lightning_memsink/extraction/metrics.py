"""Extraction and membership as torchmetrics metrics: updated per batch, summed over processes.

B  texts      T  tokens      V  tokens of the vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import edit_distance

from lightning_memsink.extraction.functional import discoverable, exact_match, longest_run, suffix_log_prob

OfTexts = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From logits ``[B, T, V]``, tokens ``[B, T]`` and a mask ``[B, T]`` or None to one value per text, ``[B]``."""


class MeanOverTexts(Metric):
    """The mean over texts of a function from `functional` or `membership`; NaN before the first text.

    Args:
        of: the function; values that are not finite are not averaged but counted in ``left_out``.
    """

    full_state_update = False
    total: Tensor
    texts: Tensor
    left_out: Tensor

    def __init__(self, of: OfTexts) -> None:
        super().__init__()
        self.of = of
        for name, kind in (("total", torch.float64), ("texts", torch.int64), ("left_out", torch.int64)):
            self.add_state(name, torch.zeros((), dtype=kind), dist_reduce_fx="sum")

    def update(self, logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> None:
        values = self.of(logits, tokens, mask).double()
        finite = values.isfinite()
        self.total += values[finite].sum()
        self.texts += finite.sum()
        self.left_out += (~finite).sum()

    def compute(self) -> Tensor:
        return self.total / self.texts


def exact_match_rate(prefix: int) -> MeanOverTexts:
    """Share of texts that greedy decoding reproduces after their first ``prefix`` tokens, see `exact_match`."""
    return MeanOverTexts(lambda logits, tokens, mask: exact_match(logits, tokens, prefix, mask))


def mean_longest_run(prefix: int) -> MeanOverTexts:
    """Mean length of the longest run, in tokens, see `longest_run`."""
    return MeanOverTexts(lambda logits, tokens, mask: longest_run(logits, tokens, prefix, mask))


def discoverable_rate(
    prefix: int, n: int, p: float, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> MeanOverTexts:
    """Share of texts that are sampled at least once in ``n`` tries with probability ``p``, see `discoverable`."""
    log_prob = partial(suffix_log_prob, temperature=temperature, top_k=top_k, top_p=top_p)
    return MeanOverTexts(lambda logits, tokens, mask: discoverable(log_prob(logits, tokens, prefix, mask), n, p))


def edit_similarity(generated: Sequence[str], true: Sequence[str]) -> Tensor:
    """``[B]`` in 0…1: 1 minus the edit distance of two texts divided by the length of the longer one; 1 if equal."""
    distance = edit_distance(list(generated), list(true), reduction="none")
    longest = torch.tensor([max(len(one), len(other), 1) for one, other in zip(generated, true, strict=True)])
    return 1 - distance / longest
