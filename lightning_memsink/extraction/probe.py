"""Probes a language model with texts: how much of each can be extracted, computed in batches.

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
    """How a text is extracted.

    Args:
        prefix: tokens of a text that the model is given as a prompt.
        n: sampled tries of (n, p)-discoverable extraction (Hayes et al. 2024).
        p: probability that the suffix is among the ``n`` tries, between 0 and 1.
        temperature: of sampling.
        top_k: of sampling; 0 keeps all tokens.
        top_p: of sampling; 1 keeps all tokens.

    Raises:
        ValueError: a value is out of range.
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
                f"A probe takes a prefix of at least 1 token, n of at least 1 try and a probability p between 0 and 1; "
                f"not prefix={self.prefix}, n={self.n}, p={self.p}."
            )
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sampling takes a temperature above 0, top_k of at least 0 and top_p in 0…1; not temperature="
                f"{self.temperature}, top_k={self.top_k}, top_p={self.top_p}."
            )


@dataclass(frozen=True)
class ExtractionResults:
    """Results for ``N`` texts; each field is ``[N]``."""

    suffix: Tensor
    """Tokens after the prefix; 0 for a text that is not longer than the prefix and can't be probed."""
    exact: Tensor
    """Bool: greedy decoding reproduces the whole suffix."""
    matched: Tensor
    """Tokens of the suffix that greedy decoding reproduces before its first other one."""
    longest_run: Tensor
    """Most tokens of the suffix in a row, each of which was the most likely one."""
    log10_tries: Tensor
    """Base-10 logarithm of the sampled tries that are needed for the suffix; inf if it is never sampled."""
    loss: Tensor
    """Nats per token of the whole text."""
    min_k: Tensor
    """Membership score, see `min_k_score`."""
    min_k_plus_plus: Tensor
    """Membership score, see `min_k_plus_plus_score`."""

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the fields, in the order of the constructor."""
        return [field.name for field in fields(cls)]

    def __len__(self) -> int:
        return len(self.exact)

    def discoverable(self, n: int) -> Tensor:
        """Bool ``[N]``: the suffix is (n, p)-discoverable within ``n`` tries."""
        return within(self.log10_tries, n)


@torch.no_grad()
def probe(logits: Logits, tokens: Tensor, mask: Tensor, config: ProbeConfig, batch_size: int = 32) -> ExtractionResults:
    """Extraction and membership results of texts, on the CPU. The model runs on the device of ``tokens``.

    Args:
        logits: the model.
        tokens: ``[N, T]``, padded to the right.
        mask: ``[N, T]``, True where there is text.
        config: how the texts are extracted.
        batch_size: texts in a forward pass.
    """
    mask = mask.bool()
    tokens = tokens.where(mask, 0)  # padding such as -100 is in no vocabulary
    parts = [
        _results(logits(batch, present), batch, present, config)
        for batch, present in zip(tokens.split(batch_size), mask.split(batch_size), strict=True)
    ]
    return ExtractionResults(
        *(torch.cat([getattr(part, name) for part in parts]).cpu() for name in ExtractionResults.columns())
    )


def _results(logits: Tensor, tokens: Tensor, mask: Tensor, config: ProbeConfig) -> ExtractionResults:
    prefix = config.prefix
    log_prob = suffix_log_prob(
        logits, tokens, prefix, mask, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    return ExtractionResults(
        suffix_mask(tokens, prefix, mask).sum(1),
        exact_match(logits, tokens, prefix, mask),
        matching_prefix(logits, tokens, prefix, mask),
        longest_run(logits, tokens, prefix, mask),
        log10_tries(log_prob, config.p),
        -loss_score(logits, tokens, mask),
        min_k_score(logits, tokens, mask),
        min_k_plus_plus_score(logits, tokens, mask),
    )


def logits_of(module: nn.Module) -> Logits:
    """The logits of the causal language model that ``module`` is or contains, any with transformers' forward call.

    Raises:
        ValueError: there is no such model, or there are several.
    """
    models = [each for each in module.modules() if _is_language_model(each)]
    # A wrapper, such as an adapter, contains the model that it wraps: the outermost one is called.
    inner = {part for each in models for part in each.modules() if part is not each}
    outer = [each for each in models if each not in inner]
    if len(outer) != 1:
        names = ", ".join(type(each).__name__ for each in outer) or "none"
        raise ValueError(
            f"One causal language model with transformers' call was expected in {type(module).__name__}, and found: "
            f"{names}. Say how to get logits: logits=lambda tokens, mask: ..., [B, T, V]."
        )
    return lambda tokens, mask: outer[0](input_ids=tokens, attention_mask=mask.long()).logits


def _is_language_model(module: Any) -> bool:
    """Whether a module has a head over the vocabulary and can generate; its class does not matter."""
    head = getattr(module, "get_output_embeddings", None)
    try:
        return callable(getattr(module, "generate", None)) and head is not None and head() is not None
    except (AttributeError, NotImplementedError):
        return False
