"""Gaps of samples and controls, drawn from known distributions."""

import torch
from torch import Tensor

NOISES = ("normal", "heavy", "right", "left")


def noise(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Gaps ``[count]`` of samples that were not trained on: normal, of Student's t with 2 degrees of freedom (infinite
    variance), or skewed to one side; of about a quarter of a nat."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "heavy":
        return 0.25 * normal(count) / normal(2, count).square().mean(0).sqrt()
    if kind == "normal":
        return 0.25 * normal(count)
    skewed = 0.2 * (normal(count).exp() - 1.6487)
    return skewed if kind == "right" else -skewed
