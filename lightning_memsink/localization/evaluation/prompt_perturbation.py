"""Is it gone, or only harder to reach? The continuation is asked for again with prompts that are not quite the same.

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
    """What came back."""

    rates: tuple[float, ...]
    """``R`` shares of the prompt's tokens that were replaced."""
    said: Tensor
    """``[R, B]`` 0…1: share of trials in which the continuation was said word for word."""

    @property
    def worst(self) -> Tensor:
        """``[B]``: the same at the rate at which it came most often."""
        return self.said.amax(0)

    @property
    def returns(self) -> float:
        """Of the sequences not said with their own prompt, the share said in some trial with a changed one; NaN if
        all were said anyway. ``rates`` has to begin with 0."""
        silent = self.said[0] == 0
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
    """Replaces tokens of the prompts at random and asks for the continuations, in the model as it is now.

    Args:
        continues: of ``[B, T]`` tokens, bool ``[B]``: given the prompt, the model says the rest word for word. Within
            `lightning_memsink.localization.ablation.ablated` it tells what an ablation is worth.
        tokens: ``[B, T]`` int64, prompts and continuations. These stay as they are.
        prompt: number of tokens of the prompt.
        vocab_size: replacements are uniform over the tokens that differ from the one replaced.
        rates: shares of the prompt to replace.
        trials: of each rate but 0, which needs only one.
    """
    generator = torch.Generator().manual_seed(seed)
    said = []
    for rate in rates:
        asked = [
            continues(perturbed(tokens, prompt, vocab_size, rate, generator)) for _ in range(trials if rate else 1)
        ]
        said.append(torch.stack(asked).float().mean(0).cpu())
    return PromptPerturbation(tuple(rates), torch.stack(said))


def perturbed(tokens: Tensor, prompt: int, vocab_size: int, rate: float, generator: torch.Generator) -> Tensor:
    """``[B, T]`` with ``round(rate * prompt)`` of each prompt's tokens replaced by other ones."""
    count = round(rate * prompt)
    places = torch.rand(len(tokens), prompt, generator=generator).argsort(1)[:, :count].to(tokens.device)
    shift = torch.randint(1, vocab_size, places.shape, generator=generator).to(tokens.device)
    return tokens.scatter(1, places, (tokens.gather(1, places) + shift) % vocab_size)
