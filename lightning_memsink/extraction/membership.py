"""Was a text in the training data? Scores of one forward, all of them larger the more it looks so.

Scores compare texts with one another, and text is unequally hard: without controls of the same kind none is evidence.

    B  texts      T  tokens      V  tokens of the vocabulary

``logits`` ``[B, T, V]`` are those of ``tokens`` ``[B, T]``; ``mask`` ``[B, T]`` holds where there is text.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_memsink.extraction.functional import suffix_mask, token_log_probs

FRACTION = 0.2
"""Of tokens, the least likely ones, that min-k% looks at (Shi et al. 2024, section 4.1)."""


def loss_score(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B]`` mean log-probability of a token, nats: minus the loss (Yeom et al. 2018, arXiv 1709.01604)."""
    return _mean(token_log_probs(logits, tokens), suffix_mask(tokens, 1, mask))


def zlib_score(logits: Tensor, tokens: Tensor, texts: Sequence[str], mask: Tensor | None = None) -> Tensor:
    """``[B]`` minus the text's nats by its compressed bytes (Carlini et al. 2021, arXiv 2012.07805, section 5.2)."""
    nats = (token_log_probs(logits, tokens) * suffix_mask(tokens, 1, mask)).sum(1)
    return nats / nats.new_tensor([len(zlib.compress(text.encode())) for text in texts])


def min_k_score(logits: Tensor, tokens: Tensor, mask: Tensor | None = None, fraction: float = FRACTION) -> Tensor:
    """``[B]`` mean log-probability of the least likely ``fraction`` of tokens (Shi et al. 2024, arXiv 2310.16789)."""
    return _mean_of_lowest(token_log_probs(logits, tokens), suffix_mask(tokens, 1, mask), fraction)


def min_k_plus_plus_score(
    logits: Tensor, tokens: Tensor, mask: Tensor | None = None, fraction: float = FRACTION
) -> Tensor:
    """``[B]`` the same of log-probabilities that are standardized by what the model foretells at that place: their
    mean and standard deviation over the vocabulary (Zhang et al. 2025, arXiv 2404.02936, equation 3)."""
    log_probs = logits[:, :-1].float().log_softmax(-1)
    probs = log_probs.exp()
    mean = (probs * log_probs).sum(-1)
    spread = ((probs * log_probs.square()).sum(-1) - mean.square()).clamp(min=0).sqrt()
    own = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    standard = (own - mean) / spread.clamp(min=1e-6)
    return _mean_of_lowest(standard, suffix_mask(tokens, 1, mask), fraction)


def reference_score(own: Tensor, reference: Tensor) -> Tensor:
    """``[B]`` how much likelier a text is to this model than to another: the difference of two `loss_score`
    (Carlini et al. 2021, arXiv 2012.07805, section 5.2)."""
    return own - reference


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """NaN of nothing."""
    return (values * counted).sum(1) / counted.sum(1)


def _mean_of_lowest(values: Tensor, counted: Tensor, fraction: float) -> Tensor:
    """At least one value a row, NaN where there is none."""
    ordered = values.masked_fill(~counted, torch.inf).sort(1).values
    many = (counted.sum(1) * fraction).long().clamp(min=1)
    lowest = torch.arange(values.shape[1], device=values.device) < many[:, None]
    return ordered.where(lowest, 0.0).sum(1).div(many).where(counted.any(1), torch.nan)
