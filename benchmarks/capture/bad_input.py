"""Cases: bad input, in the data or made by hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.capture.case import Data, Fitted, cases, family
from benchmarks.capture.classes import cross_entropy
from benchmarks.capture.data import IGNORED, counted, mlp, tagger, tokens, vectors
from benchmarks.capture.sequences import flat, unreduced

classes = family(data=vectors, network=mlp())
ragged = family(data=tokens(), network=tagger(), shares=counted)


class Guarded(Fitted):
    """Drops gradients that are not finite."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


class Skipping(Fitted):
    """Skips its second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


def changed(number: int, value: float) -> Any:
    """`vectors` with one sample whose features are ``value``."""

    def data() -> Data:
        made = vectors()
        x, y = made.samples[number]
        samples = list(made.samples)
        samples[number] = (torch.full_like(x, value), y)
        return Data(samples, made.held_out)

    return data


def ignoring(*rows: int) -> Any:
    """`tokens` some of whose samples have no target."""

    def data() -> Data:
        made = tokens()()
        samples = [
            {"x": one["x"], "y": torch.full_like(one["y"], IGNORED)} if row in rows else one
            for row, one in enumerate(made.samples)
        ]
        return Data(samples, made.held_out)

    return data


def of_size(size: int) -> Any:
    def data() -> Data:
        made = vectors()
        return Data(made.samples, made.held_out, batch_size=size)

    return data


def nothing_in_one_batch(model: Any, batch: Any) -> Tensor:
    losses, mask = unreduced(model, batch)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


class Emptied(Guarded):
    """A hook of the user's own leaves nothing of the second batch."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.count = getattr(self, "count", 0) + 1
        return [part[:0] for part in batch] if self.count == 2 else batch


def reversing() -> nn.Module:
    """A model with a hook that reverses the order of its rows."""
    net = mlp()()
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(0),))
    return net


BAD_INPUT = cases(
    "bad input",
    classes("a sample with NaN", cross_entropy, data=changed(5, float("nan")), module=Guarded, weighable=False),
    classes("a sample with infinity", cross_entropy, data=changed(5, float("inf")), module=Guarded, weighable=False),
    ragged("a sample without targets", flat, data=ignoring(3)),
    ragged(
        "batches of samples without targets",
        nothing_in_one_batch,
        alone=flat,
        data=ignoring(*range(10)),
        weighable=False,
    ),
    classes("a ragged last batch", cross_entropy, data=of_size(5)),
    classes("batches of one", cross_entropy, data=of_size(1)),
    classes("an empty batch", cross_entropy, module=Emptied, without_loss=(1,), weighable=False),
    classes("rows reordered by a forward hook", lambda m, b: F.cross_entropy(m(b[0]), b[1].flip(0)), network=reversing),
    classes("a skipped batch", cross_entropy, module=Skipping, without_loss=(1,), weighable=False),
)
