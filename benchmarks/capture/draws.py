"""Random training steps: what may happen to rows between the batch and the loss, in any order.

A step is a list of operations on the tokens ``[B, T]`` and their targets, before and after the model, and a loss of the
elements that are left. The numbers of the samples go the same way, so that each element's sample is known.

    B  samples in a batch      T  tokens of a sample      C  classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.capture.case import Case, Data
from benchmarks.capture.data import IGNORED, C, numbers, tagger

BATCHES, HELD_OUT_BATCHES = 2, 1

Operation = Callable[[Tensor], Tensor]
"""What a step does to tokens, logits and targets alike, along their first one or two axes."""


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=numbers(count))


def _mask(shape: torch.Size) -> Tensor:
    mask = torch.rand(shape, generator=numbers(sum(shape)), dtype=torch.float32) < 0.6
    mask.view(-1)[0] = True
    return mask


OPERATIONS: dict[str, Operation] = {
    "t.flip(0)": lambda t: t.flip(0),
    "t.roll(1, 0)": lambda t: t.roll(1, 0),
    "t[randperm]": lambda t: t[_order(len(t))],
    "t.index_select(0, order)": lambda t: t.index_select(0, _order(len(t))[: (len(t) + 1) // 2]),
    "t[: half]": lambda t: t[: (len(t) + 1) // 2],
    "t[1:]": lambda t: t[min(1, len(t) - 1) :],
    "t[::2]": lambda t: t[::2],
    "t[mask of rows]": lambda t: t[_mask(t.shape[:1])],
    "cat([t, t])": lambda t: torch.cat([t, t]),
    "cat([t, t.flip(0)])": lambda t: torch.cat([t, t.flip(0)]),
    "cat(t.chunk(2)[::-1])": lambda t: torch.cat(t.chunk(2)[::-1]),
    "stack([t, t]).flatten(0, 1)": lambda t: torch.stack([t, t]).flatten(0, 1),
    "stack([t, t], 1).flatten(0, 1)": lambda t: torch.stack([t, t], 1).flatten(0, 1),
    "t.repeat_interleave(2, 0)": lambda t: t.repeat_interleave(2, 0),
    "stack(list(t))": lambda t: torch.stack(list(t)),
}
"""For tensors with any number of axes."""

OF_TWO_AXES: dict[str, Operation] = {
    "t.transpose(0, 1)": lambda t: t.transpose(0, 1),
    "t.flatten(0, 1)": lambda t: t.flatten(0, 1),
    "t.transpose(0, 1).flatten(0, 1)": lambda t: t.transpose(0, 1).flatten(0, 1),
    "t[mask]": lambda t: t[_mask(t.shape[:2])],
    "t[:, 1:]": lambda t: t[:, min(1, t.shape[1] - 1) :],
    "t[:, -1]": lambda t: t[:, -1],
    "t.flip(1)": lambda t: t.flip(1),
}
"""For tensors ``[B, T]`` or ``[T, B]``, with or without classes."""


def one_hot(y: Tensor, logits: Tensor) -> Tensor:
    return F.one_hot(y.clamp(min=0), C).to(logits.dtype)


def _rows(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return logits.reshape(-1, C), y.reshape(-1)


def _cross_entropy(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(*_rows(logits, y), reduction=reduction)


def _classes_second(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), y, reduction=reduction)


def _nll(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.nll_loss(F.log_softmax(_rows(logits, y)[0], -1), y.flatten(), reduction=reduction)


def _by_hand(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    losses = -logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()


def _squared(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(logits, one_hot(y, logits), reduction=reduction)


def _binary(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, one_hot(y, logits), reduction=reduction)


def _smooth(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(*_rows(logits, y), reduction=reduction, label_smoothing=0.2)


LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "cross_entropy [N, C, ...]": _classes_second,
    "nll_loss": _nll,
    "log_softmax.gather": _by_hand,
    "mse_loss": _squared,
    "bce": _binary,
    "label smoothing": _smooth,
}
IGNORING = ("cross_entropy", "cross_entropy [N, C, ...]", "nll_loss", "label smoothing")
"""Losses that leave targets of -100 out."""

ELEMENTWISE = ("mse_loss", "bce")
"""Losses with an element for each class, too."""


@dataclass(frozen=True)
class Draw:
    """A step."""

    samples: int
    length: int
    time_major: bool
    """Whether the batch is collated as ``[T, B]``."""
    ragged: bool
    """Whether the last targets of some samples are -100."""
    before: tuple[str, ...]
    after: tuple[str, ...]
    loss: str
    reduction: str
    chunks: int
    """Pieces of the first axis, each with a loss call; 1: the whole."""
    micro: bool
    """Whether the pieces go through the model one by one."""

    def __str__(self) -> str:
        batch = f"{'[T, B]' if self.time_major else '[B, T]'} B={self.samples} T={self.length}"
        calls = "" if self.chunks == 1 else f" in {self.chunks} {'micro-batches' if self.micro else 'chunks'}"
        loss = f"{self.reduction} of {'ragged ' if self.ragged else ''}{self.loss}{calls}"
        return "; ".join([batch, *self.before, "model", *self.after, loss])

    def _apply(self, names: Sequence[str], tensor: Tensor, classes: int) -> Tensor:
        for name in names:
            if name in OPERATIONS:
                tensor = OPERATIONS[name](tensor)
            elif tensor.ndim - classes == 2:
                tensor = OF_TWO_AXES[name](tensor)
        return tensor

    def _pieces(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*(tensor.chunk(self.chunks) for tensor in tensors), strict=True))

    def _elements(self, x: Tensor, *others: Tensor, model: Any) -> list[tuple[Tensor, ...]]:
        """Logits, and ``others`` (targets, samples) as they go with them, of each loss call."""
        start = [self._apply(self.before, each, 0) for each in (x, *others)]
        pieces = self._pieces(*start) if self.micro else [tuple(start)]
        found = [
            (self._apply(self.after, model(one), 1), *(self._apply(self.after, each, 0) for each in rest))
            for one, *rest in pieces
        ]
        return found if self.micro else [piece for one in found for piece in self._pieces(*one)]

    def step(self, model: Any, batch: Any) -> Tensor:
        """The user's step."""
        found = self._elements(batch["x"], batch["y"], model=model)
        reduction = "mean" if self.reduction == "mean" else "sum"
        parts = [LOSSES[self.loss](logits, y, reduction) for logits, y in found]
        total = sum(parts[1:], parts[0])
        if self.reduction == "sum":
            return total
        if self.reduction == "mean":
            return total / len(parts)
        return total / sum(self._count(y) for _, y in found)

    def _count(self, y: Tensor) -> Tensor:
        return (y != IGNORED).sum().clamp(min=1) * (C if self.loss in ELEMENTWISE else 1)

    def rows(self, model: Any, batch: Any) -> Tensor:
        """``[B]`` each sample's loss: the mean over its elements that are left and count."""
        sums, weights, _ = self._by_sample(model, batch)
        return sums / weights

    def contributions(self, model: Any, batch: Any) -> Tensor:
        """``[B]`` each sample's part of the step's loss."""
        sums, _, divisor = self._by_sample(model, batch)
        return sums / divisor

    def _by_sample(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor | float]:
        """``[B]`` summed losses and their number, and what the step divides the sums by."""
        size = batch["y"].shape[1 if self.time_major else 0]
        axis = torch.arange(size)
        owners = (axis if self.time_major else axis[:, None]).expand(batch["y"].shape)
        found = self._elements(batch["x"], batch["y"], owners, model=model)
        sums, weights = torch.zeros(size), torch.zeros(size)
        for logits, y, owner in found:
            losses = LOSSES[self.loss](logits, y, "none").reshape(y.numel(), -1).mean(1).to(sums.dtype)
            counts = (y != IGNORED).flatten().to(sums.dtype)
            sums = sums.index_add(0, owner.flatten(), counts * losses)
            weights = weights.index_add(0, owner.flatten(), counts)
        if self.reduction == "sum":
            return sums, weights, 1.0
        return sums, weights, sum((y != IGNORED).sum().clamp(min=1) for _, y, _ in found)

    def is_even(self) -> bool:
        """Whether all loss calls have as many elements, all counted, so that a mean of means is their mean."""
        batch = self.data().collate([{"x": torch.zeros(self.length), "y": torch.zeros(self.length)}] * self.samples)
        found = self._elements(batch["x"], batch["y"], model=lambda x: x[..., None])
        return not self.ragged and len({y.numel() for _, y in found}) == 1

    def data(self) -> Data:
        generator, samples = numbers(self.samples * 7 + self.length), []
        for row in range((BATCHES + HELD_OUT_BATCHES) * self.samples):
            x, y = (torch.randint(C, (self.length,), generator=generator) for _ in range(2))
            if self.ragged:
                y[max(1, self.length - row % 3) :] = IGNORED
            samples.append({"x": x, "y": y})
        count, axis = BATCHES * self.samples, 1 if self.time_major else 0

        def collate(batch: list[Any]) -> Any:
            return {name: torch.stack([sample[name] for sample in batch], axis) for name in ("x", "y")}

        return Data(samples[:count], samples[count:], collate=collate, batch_size=self.samples)

    def case(self) -> Case:
        return Case(str(self), self.step, self.data, tagger(), rows=self.rows, contributions=self.contributions)


@st.composite
def steps(draw: Any) -> Draw:
    """Steps of at most three operations before and two after the model; B is often equal to T."""
    samples = draw(st.integers(1, 5))
    length = draw(st.one_of(st.just(samples), st.integers(1, 5)))
    names = st.sampled_from([*OPERATIONS, *OF_TWO_AXES, *OF_TWO_AXES])  # those of two axes as often as the others
    loss = draw(st.sampled_from([*LOSSES]))
    chunks = draw(st.sampled_from([1, 1, 2, 3]))
    drawn = Draw(
        samples=samples,
        length=length,
        time_major=draw(st.integers(0, 3)) == 3,
        ragged=loss in IGNORING and draw(st.booleans()),
        before=tuple(draw(st.lists(names, max_size=3))),
        after=tuple(draw(st.lists(names, max_size=2))),
        loss=loss,
        reduction="mean over all",
        chunks=chunks,
        micro=chunks > 1 and draw(st.booleans()),
    )
    reductions = ["mean over all"]
    reductions += ["sum"] if chunks == 1 and loss not in ELEMENTWISE else []
    reductions += ["mean"] if chunks == 1 or drawn.is_even() else []
    return replace(drawn, reduction=draw(st.sampled_from(reductions)))


def draw_all(count: int, first_seed: int) -> list[Draw]:
    """``count`` different steps, the same for the same seed."""
    drawn: dict[Draw, None] = {}

    @seed(first_seed)
    @settings(
        max_examples=4 * count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(steps())
    def collect(one: Draw) -> None:
        drawn[one] = None

    collect()
    return [*drawn][:count]
