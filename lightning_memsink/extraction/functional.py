"""Extraction measures of texts from one teacher-forced forward pass: nothing is generated.

Greedy decoding reproduces a text exactly as long as each token is the most likely one after the tokens before it, so
the logits of the text itself show where greedy decoding would first differ.

    B  texts      T  tokens      V  tokens of the vocabulary      S  tokens of a suffix
    R  references never trained on      K  other prefixes

``logits`` ``[B, T, V]`` are those of ``tokens`` ``[B, T]``: the logits at t predict token t + 1. The suffix is the text
after the first ``prefix`` tokens (one number, or ``[B]``), as far as ``mask`` ``[B, T]`` is True (padding is on the
right).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN10 = math.log(10)


def suffix_mask(tokens: Tensor, prefix: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Bool ``[B, T - 1]``: which of the predicted tokens belong to the suffix.

    Raises:
        ValueError: a prefix is empty.
    """
    lengths = torch.as_tensor(prefix, device=tokens.device).expand(len(tokens))
    if (lengths < 1).any():
        raise ValueError(f"A prefix of at least 1 token is needed to continue from, not {int(lengths.min())}.")
    places = torch.arange(1, tokens.shape[1], device=tokens.device) >= lengths[:, None]
    return places if mask is None else places & mask[:, 1:].bool()


def greedy_hits(logits: Tensor, tokens: Tensor) -> Tensor:
    """Bool ``[B, T - 1]``: the next token is the most likely one."""
    return logits[:, :-1].argmax(-1) == tokens[:, 1:]


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """``[B, T - 1]`` log-probability of each next token, in nats."""
    # Not by a loss function of torch: within a training step, callbacks would read it as a loss of the step.
    following = logits[:, :-1].float()
    return following.gather(-1, tokens[:, 1:, None]).squeeze(-1) - following.logsumexp(-1)


def exact_match(logits: Tensor, tokens: Tensor, prefix: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Bool ``[B]``: greedy decoding after the prefix reproduces the whole suffix; False if the suffix is empty.

    Carlini et al. 2023 (arXiv 2202.07646, definition 3.1) call such a text extractable with ``prefix`` tokens.
    """
    counted = suffix_mask(tokens, prefix, mask)
    return (greedy_hits(logits, tokens) | ~counted).all(1) & counted.any(1)


def matching_prefix(logits: Tensor, tokens: Tensor, prefix: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B]`` number of tokens of the suffix that greedy decoding reproduces before the first that differs."""
    counted = suffix_mask(tokens, prefix, mask)
    return ((greedy_hits(logits, tokens) | ~counted).cumprod(1) * counted).sum(1)


def longest_run(logits: Tensor, tokens: Tensor, prefix: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B]`` most tokens of the suffix in a row that are each the most likely one after the text before them."""
    hits = greedy_hits(logits, tokens) & suffix_mask(tokens, prefix, mask)
    so_far = hits.cumsum(1)
    at_last_miss = torch.where(hits, 0, so_far).cummax(1).values
    return (so_far - at_last_miss).amax(1) if hits.shape[1] else hits.sum(1)


def sampled_log_probs(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """``[..., V]`` log-probabilities of the distribution that ``generate(do_sample=True)`` samples; -inf for never.

    Computed by transformers' own warpers, in the order in which it applies them. ``top_k=0`` and ``top_p=1`` keep all
    tokens.

    Raises:
        ValueError: transformers refuses a setting.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    rows = logits.float().flatten(0, -2)
    warped: Tensor = warpers(torch.empty(len(rows), 0, dtype=torch.int64), rows)
    return warped.log_softmax(-1).view(logits.shape)


def suffix_log_prob(
    logits: Tensor,
    tokens: Tensor,
    prefix: int | Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """``[B]`` float64, in nats: log-probability that the whole suffix is sampled after the prefix in one try.

    -inf if ``top_k`` or ``top_p`` excludes one of its tokens, and if the suffix is empty.
    """
    distribution = sampled_log_probs(logits[:, :-1], temperature, top_k, top_p)
    log_probs = distribution.gather(-1, tokens[:, 1:, None]).squeeze(-1).double()
    counted = suffix_mask(tokens, prefix, mask)
    # Not a product with the mask: that of -inf and 0 is NaN.
    return log_probs.where(counted, 0.0).sum(1).where(counted.any(1), -math.inf)


def log10_tries(log_prob: Tensor, p: float) -> Tensor:
    """Base-10 logarithm of the tries needed to sample a suffix at least once with probability ``p``; 0 for one try.

    A text is (n, p)-discoverable if ``1 - (1 - e^log_prob)^n >= p`` (Hayes et al. 2024, arXiv 2410.19482,
    definition 3.2). This is the smallest such n, as a logarithm because n may exceed the largest float; inf where
    ``log_prob`` is -inf.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must lie between 0 and 1, not {p}.")
    log_prob = log_prob.double()
    # ln(1 - q) is -q to double precision once q is under 1e-16.
    log_minus_log_miss = torch.where(log_prob > -36, torch.log1p(-log_prob.exp()).neg().log(), log_prob)
    return ((math.log(-math.log1p(-p)) - log_minus_log_miss) / LN10).clamp(min=0)


def discoverable(log_prob: Tensor, n: int, p: float) -> Tensor:
    """Bool: the suffix is (n, p)-discoverable; see `log10_tries`."""
    return within(log10_tries(log_prob, p), n)


def within(log10_tries: Tensor, n: int) -> Tensor:
    """Bool: at most ``n`` tries are needed, given their base-10 logarithm."""
    return log10_tries <= math.log10(n) + 1e-12


def exposure(losses: Tensor, references: Tensor) -> Tensor:
    """``[B]`` exposure in bits: ``log2 (R + 1) - log2 rank`` of each loss ``[B]`` among itself and references ``[R]``.

    Carlini et al. 2019, "The Secret Sharer" (arXiv 1802.08232, definition 4), where R references, drawn in the same way
    and never trained on, stand for the space of all canaries. At most ``log2 (R + 1)``. Ties lower the exposure.
    """
    ordered = references.sort().values
    rank = 1 + torch.searchsorted(ordered, losses.to(ordered), right=True)
    return math.log2(len(references) + 1) - rank.double().log2()


def prior_log_ratio(own: Tensor, others: Tensor) -> Tensor:
    """``[B]`` nats: log-likelihood ratio of a suffix after its own prefix and after ``K`` unrelated prefixes.

    Args:
        own: ``[B]`` log-probability of the suffix after its own prefix.
        others: ``[B, K]`` after the unrelated prefixes.

    A suffix that is likely after any prefix is common, not memorized (after Tiwari et al., arXiv 2602.18733).
    """
    return own - (others.logsumexp(1) - math.log(others.shape[1]))
