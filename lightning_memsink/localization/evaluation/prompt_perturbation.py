"""Prompt perturbation: whether a continuation is gone, or still reproduced after prompts with replaced tokens.

Huang et al., "Demystifying verbatim memorization in large language models", 2024.

B  sequences      T  tokens      R  rates
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RATES = (0.0, 0.1, 0.25, 0.5)


@dataclass(frozen=True)
class PromptPerturbation:
    """How often continuations were reproduced after perturbed prompts."""

    rates: tuple[float, ...]
    """``R`` shares of the prompt's tokens that were replaced."""
    reproduced: Tensor
    """``[R, B]`` 0…1: share of trials in which the continuation was reproduced verbatim."""

    @property
    def worst(self) -> Tensor:
        """``[B]``: the largest share over the rates."""
        return self.reproduced.amax(0)

    @property
    def returns(self) -> float:
        """Of the sequences not reproduced after their own prompt, the share reproduced in some trial after a perturbed
        one; NaN if all were reproduced anyway. ``rates`` has to begin with 0."""
        silent = self.reproduced[0] == 0
        return float((self.worst[silent] > 0).float().mean())


def perturb_prompts(
    continues: Callable[[Tensor], Tensor],
    tokens: Tensor,
    prompt: int,
    vocab_size: int,
    rates: Sequence[float] = RATES,
    trials: int = 8,
    seed: int = 0,
) -> PromptPerturbation:
    """Replaces tokens of the prompts at random and tests for the continuations, in the model as it is now.

    Args:
        continues: from ``[B, T]`` tokens to bool ``[B]``: after the prompt, the model reproduces the rest verbatim.
            Inside `lightning_memsink.localization.ablation.ablated` the result shows how thorough an ablation is.
        tokens: ``[B, T]`` int64, prompts and continuations; they are not modified.
        prompt: number of tokens of the prompt.
        vocab_size: replacements are uniform over the tokens that differ from the one replaced.
        rates: shares of the prompt to replace.
        trials: per rate; rate 0 needs only one.
    """
    generator = torch.Generator().manual_seed(seed)
    reproduced = []
    for rate in rates:
        results = [
            continues(perturbed(tokens, prompt, vocab_size, rate, generator)) for _ in range(trials if rate else 1)
        ]
        reproduced.append(torch.stack(results).float().mean(0).cpu())
    return PromptPerturbation(tuple(rates), torch.stack(reproduced))


def perturbed(tokens: Tensor, prompt: int, vocab_size: int, rate: float, generator: torch.Generator) -> Tensor:
    """``[B, T]`` with ``round(rate * prompt)`` of each prompt's tokens replaced by other ones."""
    count = round(rate * prompt)
    positions = torch.rand(len(tokens), prompt, generator=generator).argsort(1)[:, :count].to(tokens.device)
    shift = torch.randint(1, vocab_size, positions.shape, generator=generator).to(tokens.device)
    return tokens.scatter(1, positions, (tokens.gather(1, positions) + shift) % vocab_size)
