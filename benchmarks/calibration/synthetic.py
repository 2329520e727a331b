"""Losses drawn from heavy-tailed and skewed distributions, correlated from one look to the next.

P  samples      L  looks      F  matching features
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.calibration.recording import Recording

LOCAL_SD, PLANTED_SDS = 0.5, 3.0
STEPS_A_LOOK = 20


@dataclass(frozen=True)
class Noise:
    """A distribution of noise and its memory.

    Attributes:
        shape: ``normal``, ``student`` (three degrees of freedom), ``lognormal`` or ``exponential``.
        tail: 1: skewed towards high losses; -1: towards low ones, as a memorized sample is.
        correlation: of a sample's noise at one look with that at the next.
        spread: by how much the spread of losses grows from the first look to the last, as a factor.
        depends_on_features: whether mean and spread differ by features, so that matching matters.
    """

    shape: str
    tail: int = 1
    correlation: float = 0.9
    spread: float = 1.0
    depends_on_features: bool = False


def draw(noise: Noise, samples: int, looks: int, seed: int) -> Recording:
    """A run in which all ``samples`` are visited half-way before each look, and learn alike."""
    generator = torch.Generator().manual_seed(seed)
    times = 2 * looks
    values = SHAPES[noise.shape](_autoregressive(noise.correlation**0.5, times, samples, generator)) * noise.tail
    features = torch.randn(samples, 2 if noise.depends_on_features else 0, generator=generator)
    mean, scale = torch.zeros(samples), torch.full((samples,), LOCAL_SD)
    if noise.depends_on_features:
        mean, scale = features[:, 0], LOCAL_SD * torch.exp(0.7 * features[:, 1])
    growth = noise.spread ** (torch.arange(times) / max(1, times - 1))
    learned = 8 - torch.log1p(torch.arange(times).float())
    losses = learned[:, None] + mean + growth[:, None] * scale * values
    look_steps = STEPS_A_LOOK * torch.arange(1, looks + 1)
    return Recording(
        visit_steps=(look_steps - STEPS_A_LOOK // 2)[:, None].expand(looks, samples).int(),
        visit_losses=losses[0::2],
        visit_features=features.expand(looks, -1, -1),
        look_steps=look_steps,
        look_losses=losses[1::2],
        look_features=features.expand(looks, -1, -1),
        kinds=torch.zeros(samples, dtype=torch.int64),
        planted_gap=PLANTED_SDS * noise.spread * scale,
    )


def _autoregressive(correlation: float, times: int, samples: int, generator: torch.Generator) -> Tensor:
    """``[times, 4, P]`` standard normal numbers, each correlated with the one before it in time."""
    drawn = torch.randn(times, 4, samples, generator=generator)
    for time in range(1, times):
        drawn[time] = correlation * drawn[time - 1] + math.sqrt(1 - correlation**2) * drawn[time]
    return drawn


def _student(normals: Tensor) -> Tensor:
    return normals[:, 0] / normals[:, 1:].square().mean(1).sqrt() / math.sqrt(3)


def _lognormal(normals: Tensor) -> Tensor:
    return (normals[:, 0].exp() - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def _exponential(normals: Tensor) -> Tensor:
    drawn: Tensor = -torch.special.log_ndtr(-normals[:, 0]) - 1
    return drawn


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda normals: normals[:, 0],
    "student": _student,
    "lognormal": _lognormal,
    "exponential": _exponential,
}
"""Noise with mean 0 and standard deviation 1, from four standard normal numbers ``[., 4, P]``."""
