"""Cases: losses of classifiers, on batches ``(x [B, D], y [B])``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.capture.case import cases, family
from benchmarks.capture.data import CLASS_WEIGHT, C, D, mlp, numbers, tagger, tokens, vectors

classes = family(data=vectors, network=mlp())
TEMPERATURE = 3.0
WEIGHT = torch.randn(C, D, generator=numbers(9))
"""Of a fixed teacher."""


def weight(model: Any) -> Tensor:
    """The class weights in the type of the model."""
    return CLASS_WEIGHT.to(next(iter(model.parameters())).dtype)


def by_class_weight(batch: Any) -> Tensor:
    weights = CLASS_WEIGHT[batch[1]].double()
    return weights / weights.sum()


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def one_hot(y: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(y, C).to(like.dtype)


def soft(model: Any, batch: Any, **options: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits, (2 * one_hot(batch[1], logits)).softmax(-1), **options)


def softmax_then_log(model: Any, batch: Any) -> Tensor:
    probabilities = model(batch[0]).softmax(-1)
    return -torch.log(probabilities[torch.arange(len(probabilities)), batch[1]] + 1e-8).mean()


def gathered(model: Any, batch: Any) -> Tensor:
    return -model(batch[0]).log_softmax(-1).gather(1, batch[1][:, None]).squeeze(1).mean()


def indexed(model: Any, batch: Any) -> Tensor:
    log_probabilities = F.log_softmax(model(batch[0]), dim=-1)
    return -log_probabilities[torch.arange(len(batch[1])), batch[1]].mean()


def with_one_hot(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return -(one_hot(batch[1], logits) * logits.log_softmax(-1)).sum(-1).mean()


def with_logsumexp(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return (logits.logsumexp(-1) - logits.gather(1, batch[1][:, None])[:, 0]).mean()


def smoothed_by_hand(model: Any, batch: Any) -> Tensor:
    log_probabilities = model(batch[0]).log_softmax(-1)
    nll = -log_probabilities.gather(1, batch[1][:, None])[:, 0]
    return (0.9 * nll - 0.1 * log_probabilities.mean(-1)).mean()


# Distillation ------------------------------------------------------------------------------------------------


def teacher(x: Tensor) -> Tensor:
    return (x @ WEIGHT.to(x.dtype).T / TEMPERATURE).softmax(-1)


def kl(model: Any, batch: Any, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(F.log_softmax(model(batch[0]) / TEMPERATURE, -1), teacher(batch[0]), reduction=reduction)


def distilled(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    divergence = F.kl_div(F.log_softmax(logits / TEMPERATURE, -1), teacher(batch[0]), reduction="batchmean") * (
        TEMPERATURE**2
    )
    return 0.7 * divergence + 0.3 * F.cross_entropy(logits, batch[1])


def token_distilled(model: Any, batch: Any) -> Tensor:
    logits = model(batch["x"])
    log_target = (2 * one_hot(batch["x"], logits)).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), log_target, log_target=True, reduction="none").sum(-1).mean()


# Focal and other robust losses ----------------------------------------------------------------------------------


def focal(model: Any, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def focal_by_hand(model: Any, batch: Any) -> Tensor:
    log_p = model(batch[0]).log_softmax(-1).gather(1, batch[1][:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def sigmoid_focal(model: Any, batch: Any, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    logits = model(batch[0])
    targets = one_hot(batch[1], logits)
    p = torch.sigmoid(logits)
    ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = (alpha * targets + (1 - alpha) * (1 - targets)) * ce * ((1 - p_t) ** gamma)
    return loss.mean()


def generalized(model: Any, batch: Any) -> Tensor:
    p = model(batch[0]).softmax(-1).gather(1, batch[1][:, None])[:, 0]
    return ((1 - p**0.7) / 0.7).mean()


def poly(model: Any, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (losses + 1.5 * (1 - torch.exp(-losses))).mean()


def confident(model: Any, batch: Any) -> Tensor:
    log_probabilities = model(batch[0]).log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    return F.nll_loss(log_probabilities, batch[1]) - 0.1 * entropy


def z_loss(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1]) + 0.05 * logits.logsumexp(-1).square().mean()


HARD = 2


def hardest(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").topk(HARD).values.mean()


def hardest_rows(model: Any, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.where(losses >= losses.topk(HARD).values[-1], torch.nan)


def hardest_parts(model: Any, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses * (losses >= losses.topk(HARD).values[-1]) / HARD


# Binary and multi-label --------------------------------------------------------------------------------------


def binary(function: Any, **options: Any) -> Any:
    def step(model: Any, batch: Any) -> Tensor:
        logits = model(batch[0])
        given = {key: value.to(logits.dtype) for key, value in options.items()}
        return function(logits, one_hot(batch[1], logits), **given)

    return step


def on_probabilities(model: Any, batch: Any) -> Tensor:
    probabilities = torch.sigmoid(model(batch[0]))
    return F.binary_cross_entropy(probabilities, one_hot(batch[1], probabilities))


def signs(y: Tensor, like: Tensor) -> Tensor:
    return 2 * one_hot(y, like) - 1


def hinge(model: Any, batch: Any) -> Tensor:
    scores = model(batch[0])
    return torch.clamp(1 - signs(batch[1], scores) * scores, min=0).mean()


def squared_hinge(model: Any, batch: Any) -> Tensor:
    scores = model(batch[0])
    return F.relu(1 - signs(batch[1], scores) * scores).pow(2).sum(-1).mean()


def soft_margin(model: Any, batch: Any) -> Tensor:
    scores = model(batch[0])
    return F.soft_margin_loss(scores, signs(batch[1], scores))


CLASSES = cases(
    "classifier",
    classes("cross_entropy", cross_entropy),
    classes("class weights", lambda m, b: F.cross_entropy(m(b[0]), b[1], weight(m)), shares=by_class_weight),
    classes("label smoothing", lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1)),
    classes(
        "class weights and label smoothing",
        lambda m, b: F.cross_entropy(m(b[0]), b[1], weight(m), label_smoothing=0.1),
        shares=by_class_weight,
    ),
    classes("label smoothing by hand", smoothed_by_hand),
    classes("soft targets", soft),
    classes("soft targets and class weights", lambda m, b: soft(m, b, weight=weight(m))),
    classes(
        "a sum over samples",
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        shares=lambda b: torch.ones(len(b[1])),
    ),
    classes(
        "a factor",
        lambda m, b: 0.3 * cross_entropy(m, b),
        alone=cross_entropy,
        shares=lambda b: 0.3 / b[1].new_full((len(b[1]),), len(b[1])).double(),
    ),
    classes("nll_loss", lambda m, b: F.nll_loss(F.log_softmax(m(b[0]), 1), b[1])),
    classes("log_softmax().gather()", gathered),
    classes("log_softmax()[arange, y]", indexed),
    classes("one-hot times log_softmax", with_one_hot),
    classes("logsumexp by hand", with_logsumexp),
    classes("softmax, then log", softmax_then_log),
    classes(
        "distillation, batchmean and T²",
        lambda m, b: kl(m, b) * TEMPERATURE**2,
        alone=kl,
        shares=lambda b: TEMPERATURE**2 * torch.full((len(b[1]),), 1 / len(b[1])),
    ),
    classes("distillation, mean", lambda m, b: kl(m, b, "mean")),
    classes("distillation, sum(-1).mean()", lambda m, b: kl(m, b, "none").sum(-1).mean()),
    classes("distillation and cross entropy", distilled, unit=".7 T² KL + .3 cross entropy"),
    classes("distillation of tokens", token_distilled, data=tokens(ragged=False), network=tagger()),
    classes("focal, from cross entropy", focal),
    classes("focal, by hand", focal_by_hand),
    classes("sigmoid focal", sigmoid_focal),
    classes("generalized cross entropy", generalized),
    classes("poly loss", poly),
    classes("confidence penalty", confident, unit="nll - .1 entropy"),
    classes("z-loss", z_loss, unit="cross entropy + .05 z²"),
    classes("the hardest half", hardest, rows=hardest_rows, contributions=hardest_parts, unit="none for the others"),
    classes("square root of the loss", lambda m, b: cross_entropy(m, b) ** 0.5, weighable=False, must_refuse=True),
    classes("exponential of the loss", lambda m, b: cross_entropy(m, b).exp(), weighable=False, must_refuse=True),
    classes("binary cross entropy", binary(F.binary_cross_entropy_with_logits)),
    classes("pos_weight", binary(F.binary_cross_entropy_with_logits, pos_weight=CLASS_WEIGHT)),
    classes(
        "binary cross entropy with weights",
        binary(F.binary_cross_entropy_with_logits, weight=CLASS_WEIGHT),
        also=lambda b: torch.full((len(b[1]),), 1 / float(CLASS_WEIGHT.mean())),
    ),
    classes("binary cross entropy of probabilities", on_probabilities),
    classes("multilabel_soft_margin_loss", binary(F.multilabel_soft_margin_loss)),
    classes("soft_margin_loss", soft_margin),
    classes("hinge by hand", hinge),
    classes("squared hinge", squared_hinge),
    classes("multi_margin_loss", lambda m, b: F.multi_margin_loss(m(b[0]), b[1])),
)
