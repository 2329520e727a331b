"""Small data sets and networks of the cases.

B  samples in a batch      T  tokens of a sample      C  classes      D  features
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.capture.case import BATCH, Data

C, D, H, T = 5, 6, 8, 7
IGNORED = -100
TRAINING, HELD_OUT = 3 * BATCH, 2 * BATCH
CLASS_WEIGHT = torch.linspace(0.5, 2.0, C)


def split(samples: list[Any], **options: Any) -> Data:
    """The last ones are held out."""
    return Data(samples[:-HELD_OUT], samples[-HELD_OUT:], **options)


def numbers(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors() -> Data:
    """``(x [D], y)``: features and a class."""
    generator, count = numbers(), TRAINING + HELD_OUT
    x, y = torch.randn(count, D, generator=generator), torch.randint(C, (count,), generator=generator)
    return split(list(zip(x, y, strict=True)))


def vectors_with(*widths: int) -> Callable[[], Data]:
    """``(x [D], ...)``: features and further vectors of normal numbers, ``[]`` for a width of 0."""

    def data() -> Data:
        generator, count = numbers(), TRAINING + HELD_OUT
        parts = [torch.randn(count, width or 1, generator=generator) for width in (D, *widths)]
        parts = [part if width else part[:, 0] for part, width in zip(parts, (D, *widths), strict=True)]
        return split(list(zip(*parts, strict=True)))

    return data


def views() -> Data:
    """``{"one", "two": [D], "y"}``: two views of a sample and its class."""
    generator, count = numbers(), TRAINING + HELD_OUT
    one = torch.randn(count, D, generator=generator)
    two, y = (
        one + 0.5 * torch.randn(count, D, generator=generator),
        torch.randint(2, (count,), generator=generator),
    )
    return split([{"one": a, "two": b, "y": c} for a, b, c in zip(one, two, y, strict=True)])


def tokens(length: int = T, ragged: bool = True, collate: Any = None) -> Callable[[], Data]:
    """``{"x": [T], "y": [T]}``: tokens and a class for each, the last ones ignored if ``ragged``."""

    def data() -> Data:
        generator, count = numbers(), TRAINING + HELD_OUT
        x, y = (torch.randint(C, (count, length), generator=generator) for _ in range(2))
        if ragged:
            for row in range(count):
                y[row, length - row % 3 :] = IGNORED
        samples = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        return split(samples) if collate is None else split(samples, collate=collate)

    return data


def counted(batch: Any) -> Tensor:
    """``[B]`` shares of samples in a mean over the tokens that are not ignored."""
    count: Tensor = (batch["y"] != IGNORED).flatten(1).sum(1).double()
    return count / count.sum()


def time_major(samples: list[Any]) -> Any:
    """Stacks along the second axis: ``[T, B]``."""
    return {key: torch.stack([sample[key] for sample in samples], 1) for key in samples[0]}


def images() -> Data:
    """``(image [3, 6, 6], y [6, 6])``: a class for each pixel."""
    generator, count = numbers(), TRAINING + HELD_OUT
    x, y = torch.randn(count, 3, 6, 6, generator=generator), torch.randint(C, (count, 6, 6), generator=generator)
    return split(list(zip(x, y, strict=True)))


def mlp(outputs: int = C, inputs: int = D) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(inputs, H), nn.Tanh(), nn.Linear(H, outputs))


def tagger(outputs: int = C) -> Callable[[], nn.Module]:
    """Tokens ``[...]`` to ``[..., outputs]``."""
    return lambda: nn.Sequential(nn.Embedding(C, D), nn.Linear(D, H), nn.Tanh(), nn.Linear(H, outputs))


def convolution() -> nn.Module:
    """Images ``[B, 3, 6, 6]`` to ``[B, C, 6, 6]``."""
    return nn.Sequential(nn.Conv2d(3, H, 3, padding=1), nn.GELU(), nn.Conv2d(H, C, 1))


def normalized() -> nn.Module:
    """With batch norm."""
    return nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, C))


class Heads(nn.Module):
    """A shared body and named heads: ``heads(x)`` is a dict of outputs."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, H), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(H, width) for name, width in widths.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {name: head(hidden) for name, head in self.heads.items()}


def heads(**widths: int) -> Callable[[], nn.Module]:
    return lambda: Heads(**widths)
