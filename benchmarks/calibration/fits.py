"""Small fits of usual kinds that measure, beside training, many held-out samples as if these were trained on too.

P  held-out samples      V  rounds of visits, one before each look      F  matching features
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.calibration.recording import PLANTED_NATS, Recording
from lightning_memsink.detection.difficulty import Matching
from lightning_memsink.samples.tokens import Tokens

Losses = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
"""``losses(model, batch) -> [B]``."""


@dataclass(frozen=True)
class Fit:
    """A model, what it is trained on and what is held out. Both data sets are tensors, a row a sample."""

    model: nn.Module
    losses: Losses
    training: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    kinds: Tensor
    """``[P]``"""
    looks: int
    steps_a_look: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    is_text: bool = False
    """Whether the first tensor of a data set is text ``[., T]``, which is matched on its n-grams."""
    is_scale: bool = False


def record(fit: Fit, seed: int) -> Recording:
    """Trains the model, and measures every held-out sample once before each look and once at it.

    The visits of a round are spread over the steps between two looks, as those of a shuffled epoch are.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = _Batches(len(fit.training[0]), fit.batch_size, generator)
    count, features = len(fit.held_out[0]), _Features(fit)
    optimizer = torch.optim.AdamW(fit.model.parameters(), lr=fit.learning_rate)
    visit_steps = torch.zeros(fit.looks, count, dtype=torch.int32)
    visit_losses, look_losses = torch.zeros(fit.looks, count), torch.zeros(fit.looks, count)
    visit_features, look_features = (torch.zeros(fit.looks, count, features.width) for _ in range(2))
    everyone = torch.arange(count)
    for look in range(fit.looks):
        order = torch.randperm(count, generator=generator)
        fit.model.train()
        for number, some in enumerate(order.tensor_split(fit.steps_a_look)):
            visit_steps[look, some] = look * fit.steps_a_look + number
            visit_losses[look, some] = _measured(fit, some)
            visit_features[look, some] = features.of(some)
            rows = batches.next()
            optimizer.zero_grad()
            fit.losses(fit.model, _rows(fit.training, rows)).mean().backward()
            nn.utils.clip_grad_norm_(fit.model.parameters(), 1.0)
            optimizer.step()
            features.count(rows)
        fit.model.eval()
        look_losses[look], look_features[look] = _measured(fit, everyone), features.of(everyone)
    return Recording(
        visit_steps,
        visit_losses,
        visit_features,
        fit.steps_a_look * torch.arange(1, fit.looks + 1),
        look_losses,
        look_features,
        fit.kinds,
        torch.full((count,), PLANTED_NATS),
        fit.is_scale,
    )


def _rows(data: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[rows] for tensor in data)


@torch.no_grad()
def _measured(fit: Fit, samples: Tensor) -> Tensor:
    """``[B]`` losses of held-out ``samples`` ``[B]``, in the mode that the model is in."""
    parts = [fit.losses(fit.model, _rows(fit.held_out, part)) for part in samples.split(256)]
    return torch.cat(parts) if parts else torch.zeros(0)


class _Batches:
    """Rows of the training set in a new order each epoch."""

    def __init__(self, rows: int, batch_size: int, generator: torch.Generator) -> None:
        self.rows, self.batch_size, self.generator = rows, batch_size, generator
        self.left: list[Tensor] = []

    def next(self) -> Tensor:
        if not self.left:
            whole = self.rows // self.batch_size * self.batch_size
            self.left = list(torch.randperm(self.rows, generator=self.generator)[:whole].split(self.batch_size))
        return self.left.pop()


class _Features:
    """Matching features of held-out texts, by the n-grams of the text trained on so far; of others there is none."""

    def __init__(self, fit: Fit) -> None:
        self.fit, self.matching = fit, Matching()
        self.width = self.of(torch.arange(1)).shape[1]

    def of(self, samples: Tensor) -> Tensor:
        """``[B, F]`` of the held-out ``samples`` ``[B]``, now."""
        tokens = _tokens(self.fit.held_out[0][samples]) if self.fit.is_text else None
        return self.matching.of_controls(samples, tokens, None)

    def count(self, rows: Tensor) -> None:
        """Counts the n-grams of training texts ``rows`` ``[B]``."""
        if self.fit.is_text:
            tokens = _tokens(self.fit.training[0][rows])
            self.matching.counts.update(self.matching.counts.look_up(tokens.ids, tokens.mask))


def _tokens(text: Tensor) -> Tokens:
    return Tokens(text, torch.ones_like(text, dtype=torch.bool))
