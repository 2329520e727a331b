"""Cases: losses that only their author can split, manual optimization, adversaries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.capture.case import Fitted, cases, family
from benchmarks.capture.classes import cross_entropy, one_hot
from benchmarks.capture.data import C, D, heads, mlp, vectors, vectors_with
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.losses.per_sample import per_sample

classes = family(data=vectors, network=mlp())
tasks = family(data=vectors, network=heads(label=C, value=D))


# Losses that only their author can split --------------------------------------------------------------------------


class _CustomLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(logits, y)
        return F.cross_entropy(logits, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, y = ctx.saved_tensors
        return gradient * (logits.softmax(-1) - one_hot(y, logits)) / len(y), None


def custom(model: Any, batch: Any) -> Tensor:
    return _CustomLoss.apply(model(batch[0]), batch[1])


def reported(model: Any, batch: Any) -> Any:
    return per_sample(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))


def returned(model: Any, batch: Any) -> Any:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return {"loss": losses.mean() ** 0.5, "losses": losses}


class Manual(Fitted):
    """Manual optimization with one loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.case.step(self, batch))
        self.optimizers().step()


# Adversaries ------------------------------------------------------------------------------------------------------


class Adversaries(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = mlp(D)()
        self.discriminator = mlp(1)()


def judged_real(score: Tensor, real: bool, reduction: str = "mean") -> Tensor:
    target = torch.ones_like(score) if real else torch.zeros_like(score)
    return F.binary_cross_entropy_with_logits(score, target, reduction=reduction)


class GAN(Fitted):
    """Manual optimization with two optimizers and a backward for each."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, z = batch
        generator_optimizer, discriminator_optimizer = self.optimizers()
        fake = self.net.generator(z)
        generator_optimizer.zero_grad()
        self.manual_backward(judged_real(self.net.discriminator(fake), True))
        generator_optimizer.step()
        discriminator_optimizer.zero_grad()
        self.manual_backward(gan_discriminator(self, x, fake.detach()))
        discriminator_optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net.generator, self.net.discriminator)]


def gan_discriminator(model: Any, x: Tensor, fake: Tensor) -> Tensor:
    score = model.net.discriminator
    return 0.5 * (judged_real(score(x), True) + judged_real(score(fake), False))


def gan(model: Any, batch: Any) -> Tensor:
    """Both losses of a step, as they are before its updates."""
    x, z = batch
    fake = model.net.generator(z)
    return judged_real(model.net.discriminator(fake), True) + gan_discriminator(model, x, fake.detach())


def gan_parts(model: Any, batch: Any) -> Tensor:
    """Each loss with the gradient of its own optimizer's parameters only."""
    x, z = batch
    net = model.net
    fake = net.generator(z)
    frozen = {name: value.detach() for name, value in net.discriminator.named_parameters()}
    generator = judged_real(functional_call(net.discriminator, frozen, (fake,)), True, "none")
    discriminator = judged_real(net.discriminator(x), True, "none") + judged_real(
        net.discriminator(fake.detach()), False, "none"
    )
    return (generator + 0.5 * discriminator)[:, 0] / len(x)


class TwoBackwards(Fitted):
    """Manual optimization: two losses, each with a backward of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        out = self(batch[0])
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(out["label"], batch[1]), retain_graph=True)
        self.manual_backward(0.5 * F.mse_loss(out["value"], batch[0]))
        optimizer.step()


def two_backwards(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out["label"], batch[1]) + 0.5 * F.mse_loss(out["value"], batch[0])


MANUAL = cases(
    "by hand",
    classes("custom autograd function", custom),
    classes("per_sample(losses)", reported),
    classes(
        "LossTracker(loss=function)",
        returned,
        alone=cross_entropy,
        weighable=False,
        returns=True,
        tracker=lambda: LossTracker(loss=lambda batch, outputs: outputs["losses"]),
    ),
    family(data=vectors_with(D), network=Adversaries)(
        "GAN, two optimizers",
        gan,
        module=GAN,
        automatic=False,
        contributions=gan_parts,
        unit="generator's + discriminator's",
    ),
    tasks("two backwards", two_backwards, module=TwoBackwards, automatic=False, unit="sum of both"),
    classes("manual optimization", cross_entropy, module=Manual, automatic=False),
)
