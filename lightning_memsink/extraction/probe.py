"""Asks a model for texts: what can be extracted of each, in batches, without a trace in the run.

N  texts      T  tokens      V  tokens of the vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.extraction.functional import (
    exact_match,
    log10_tries,
    longest_run,
    matching_prefix,
    suffix_log_prob,
    suffix_mask,
    within,
)
from lightning_memsink.extraction.membership import loss_score, min_k_plus_plus_score, min_k_score

Logits = Callable[[Tensor, Tensor], Tensor]
"""From tokens ``[B, T]`` and a mask ``[B, T]`` of what is text to logits ``[B, T, V]``."""


@dataclass(frozen=True)
class ProbeConfig:
    """How a text is asked for.

    Args:
        prefix: tokens that the model is given.
        n: sampled tries, and ``p``, the probability to see the rest among them: (n, p)-discoverable extraction.
        temperature: of sampling, as ``top_k`` and ``top_p``; defaults draw from the whole distribution.

    Raises:
        ValueError: for what no text can be asked with.
    """

    prefix: int = 32
    n: int = 1000
    p: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.prefix < 1 or self.n < 1 or not 0 < self.p < 1:
            raise ValueError(
                f"A text is asked for with a prefix of at least 1 token, in at least 1 try, with a probability between "
                f"0 and 1; not prefix={self.prefix}, n={self.n}, p={self.p}."
            )
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sampling takes a temperature above 0, top_k of at least 0 and top_p in 0…1; not temperature="
                f"{self.temperature}, top_k={self.top_k}, top_p={self.top_p}."
            )


@dataclass(frozen=True)
class ExtractionResults:
    """Of N texts, ``[N]`` each."""

    suffix: Tensor
    """Tokens after the prefix; 0 for a text that is no longer than it, of which nothing can be asked."""
    exact: Tensor
    """Bool: the whole suffix comes word for word."""
    matched: Tensor
    """Tokens of the suffix before the first other one."""
    longest_run: Tensor
    log10_tries: Tensor
    """Of the tries needed for a sampled suffix; inf if it never comes."""
    loss: Tensor
    """Nats per token of the whole text."""
    min_k: Tensor
    min_k_plus_plus: Tensor

    def __len__(self) -> int:
        return len(self.exact)

    def discoverable(self, n: int) -> Tensor:
        """Bool ``[N]``: within ``n`` tries."""
        return within(self.log10_tries, n)


@torch.no_grad()
def probe(logits: Logits, tokens: Tensor, mask: Tensor, scheme: ProbeConfig, batch_size: int = 32) -> ExtractionResults:
    """Answers on the CPU; texts go where ``tokens`` are.

    Args:
        logits: the model.
        tokens: ``[N, T]``, padded to the right.
        mask: ``[N, T]``, true where there is text.
        batch_size: texts in a forward.
    """
    mask = mask.bool()
    tokens = tokens.where(mask, 0)  # -100, say, is in no vocabulary
    parts = [
        _answers(logits(some, present), some, present, scheme)
        for some, present in zip(tokens.split(batch_size), mask.split(batch_size), strict=True)
    ]
    columns = [field.name for field in fields(ExtractionResults)]
    return ExtractionResults(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in columns))


def _answers(logits: Tensor, tokens: Tensor, mask: Tensor, scheme: ProbeConfig) -> ExtractionResults:
    prefix = scheme.prefix
    log_prob = suffix_log_prob(
        logits, tokens, prefix, mask, temperature=scheme.temperature, top_k=scheme.top_k, top_p=scheme.top_p
    )
    return ExtractionResults(
        suffix_mask(tokens, prefix, mask).sum(1),
        exact_match(logits, tokens, prefix, mask),
        matching_prefix(logits, tokens, prefix, mask),
        longest_run(logits, tokens, prefix, mask),
        log10_tries(log_prob, scheme.p),
        -loss_score(logits, tokens, mask),
        min_k_score(logits, tokens, mask),
        min_k_plus_plus_score(logits, tokens, mask),
    )


def logits_of(module: nn.Module) -> Logits:
    """How to get logits out of the causal language model that ``module`` is or holds: any with transformers' call.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [each for each in module.modules() if _is_language_model(each)]
    # A wrapper, as an adapter's, holds the model it wraps: the outermost is the one to call.
    inner = {part for each in found for part in each.modules() if part is not each}
    outer = [each for each in found if each not in inner]
    if len(outer) != 1:
        names = ", ".join(type(each).__name__ for each in outer) or "none"
        raise ValueError(
            f"One causal language model with transformers' call was expected in {type(module).__name__}, and found: "
            f"{names}. Say how to get logits: logits=lambda tokens, mask: ..., [B, T, V]."
        )
    return lambda tokens, mask: outer[0](input_ids=tokens, attention_mask=mask.long()).logits


def _is_language_model(module: Any) -> bool:
    """By what it has, not by its class: a head over the vocabulary, and generation."""
    head = getattr(module, "get_output_embeddings", None)
    try:
        return callable(getattr(module, "generate", None)) and head is not None and head() is not None
    except (AttributeError, NotImplementedError):
        return False
