"""Membership scores from one forward pass; a larger score means that the text is more likely in the training data.

Texts differ in difficulty, so a score is evidence only in comparison with controls of the same kind.

    B  texts      T  tokens      V  tokens of the vocabulary

``logits`` ``[B, T, V]`` are those of ``tokens`` ``[B, T]``; ``mask`` ``[B, T]`` is True where there is text.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_memsink.extraction.functional import suffix_mask, token_log_probs

FRACTION = 0.2
"""Share of tokens, the least likely ones, that min-k% averages (Shi et al. 2024, section 4.1)."""


def loss_score(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B]`` mean log-probability of a token in nats, which is minus the loss (Yeom et al. 2018, arXiv 1709.01604)."""
    return _mean(token_log_probs(logits, tokens), suffix_mask(tokens, 1, mask))


def zlib_score(logits: Tensor, tokens: Tensor, texts: Sequence[str], mask: Tensor | None = None) -> Tensor:
    """``[B]`` log-probability of a text in nats, divided by its number of zlib-compressed bytes (Carlini et al. 2021,
    arXiv 2012.07805, section 5.2)."""
    nats = (token_log_probs(logits, tokens) * suffix_mask(tokens, 1, mask)).sum(1)
    return nats / nats.new_tensor([len(zlib.compress(text.encode())) for text in texts])


def min_k_score(logits: Tensor, tokens: Tensor, mask: Tensor | None = None, fraction: float = FRACTION) -> Tensor:
    """``[B]`` min-k%: mean log-probability of the least likely ``fraction`` of tokens (Shi et al. 2024, arXiv
    2310.16789)."""
    return _mean_of_lowest(token_log_probs(logits, tokens), suffix_mask(tokens, 1, mask), fraction)


def min_k_plus_plus_score(
    logits: Tensor, tokens: Tensor, mask: Tensor | None = None, fraction: float = FRACTION
) -> Tensor:
    """``[B]`` min-k%++: `min_k_score` of standardized log-probabilities, by the mean and standard deviation of all
    log-probabilities that the model predicts at that position (Zhang et al. 2025, arXiv 2404.02936, equation 3)."""
    log_probs = logits[:, :-1].float().log_softmax(-1)
    probs = log_probs.exp()
    mean = (probs * log_probs).sum(-1)
    deviation = ((probs * log_probs.square()).sum(-1) - mean.square()).clamp(min=0).sqrt()
    own = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    standard = (own - mean) / deviation.clamp(min=1e-6)
    return _mean_of_lowest(standard, suffix_mask(tokens, 1, mask), fraction)


def reference_score(own: Tensor, reference: Tensor) -> Tensor:
    """``[B]`` log-likelihood ratio per token of this model and a reference model: the difference of two `loss_score`
    (Carlini et al. 2021, arXiv 2012.07805, section 5.2)."""
    return own - reference


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of each row's counted values; NaN for a row without any."""
    return (values * counted).sum(1) / counted.sum(1)


def _mean_of_lowest(values: Tensor, counted: Tensor, fraction: float) -> Tensor:
    """Mean of the lowest ``fraction`` of each row's counted values, at least of one; NaN for a row without any."""
    ordered = values.masked_fill(~counted, torch.inf).sort(1).values
    count = (counted.sum(1) * fraction).long().clamp(min=1)
    lowest = torch.arange(values.shape[1], device=values.device) < count[:, None]
    return ordered.where(lowest, 0.0).sum(1).div(count).where(counted.any(1), torch.nan)
