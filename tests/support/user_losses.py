"""Losses as users write them in a training step, by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy

from tests.support.capturing import (
    CLASS_WEIGHT,
    C,
    Model,
    against,
    flat,
    targets,
)


def masked_mean(model, batch):
    mask = (batch["y"] != -100).float()
    losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"].clamp(min=0), reduction="none")
    return (losses * mask).sum() / mask.sum()


def shifted(model, batch):
    logits = model(batch["x"])[:, :-1].contiguous()
    return F.cross_entropy(logits.view(-1, C), batch["y"][:, 1:].contiguous().view(-1))


def soft_labels(model, batch):
    return F.cross_entropy(model(batch["x"]).view(-1, C), torch.softmax(3 * targets(batch), -1).view(-1, C))


def by_hand(model, batch):
    log_probs = torch.log_softmax(model(batch["x"]), -1)
    return -log_probs.gather(-1, batch["y"].clamp(min=0)[..., None]).mean()


def classification(model, batch):
    return F.cross_entropy(model(batch["x"]).mean(1), batch["y"][:, 0])


def on_probabilities(model, batch):
    return F.binary_cross_entropy(model(batch["x"]).sigmoid(), targets(batch))


def squared_by_hand(model, batch):
    return ((model(batch["x"]) - targets(batch)) ** 2).mean()


USERS = {
    "cross_entropy": lambda m, b: F.cross_entropy(*flat(m, b)),
    "imported by name": lambda m, b: cross_entropy(*flat(m, b)),
    "class weight": lambda m, b: F.cross_entropy(*flat(m, b), weight=CLASS_WEIGHT),
    "ignore_index": lambda m, b: F.cross_entropy(*flat(m, b), ignore_index=-100),
    "ignored class": lambda m, b: F.cross_entropy(flat(m, b)[0], flat(m, b)[1].clamp(min=0), ignore_index=0),
    "label smoothing": lambda m, b: F.cross_entropy(*flat(m, b), label_smoothing=0.1),
    "soft labels": soft_labels,
    "module": lambda m, b: nn.CrossEntropyLoss(ignore_index=-100)(*flat(m, b)),
    "nll_loss": lambda m, b: F.nll_loss(F.log_softmax(flat(m, b)[0], -1), flat(m, b)[1]),
    "two-dimensional": lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"]),
    "two-dimensional, smoothed": lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"], label_smoothing=0.2),
    "shifted": shifted,
    "classification": classification,
    "mse": against(F.mse_loss),
    "mse module": against(nn.MSELoss()),
    "l1": against(F.l1_loss),
    "smooth l1": against(F.smooth_l1_loss, beta=0.3),
    "huber": against(F.huber_loss, delta=0.4),
    "bce": on_probabilities,
    "bce with logits": against(F.binary_cross_entropy_with_logits),
    "bce with pos_weight": against(F.binary_cross_entropy_with_logits, pos_weight=CLASS_WEIGHT),
}


BY_HAND = {
    "log-softmax by hand": by_hand,
    "square by hand": squared_by_hand,
}


def indexed_mean(model, batch):
    losses = F.cross_entropy(*flat(model, batch), reduction="none").view(batch["y"].shape)
    return losses[batch["y"] != -100].mean()


FACTORS = {
    "a factor": lambda m, b: 0.3 * F.cross_entropy(*flat(m, b)),
    "a sum": lambda m, b: F.cross_entropy(*flat(m, b), reduction="sum"),
    "a number of items": lambda m, b: F.cross_entropy(*flat(m, b), reduction="sum") / 1000,
    "a masked mean": masked_mean,
    "a penalty": lambda m, b: F.cross_entropy(*flat(m, b)) + sum(p.abs().mean() for p in m.parameters()),
    "a drift penalty": lambda m, b: F.cross_entropy(*flat(m, b)) + (m.mix.weight - 1).abs().mean(),
    "a loss only logged": lambda m, b: (m.log("mse", against(F.mse_loss)(m, b)), F.cross_entropy(*flat(m, b)))[1],
    "a dict": lambda m, b: {"loss": F.cross_entropy(*flat(m, b)), "other": 1},
}


def in_chunks(pieces, reduction="sum"):
    def step(model, batch):
        parts = [F.cross_entropy(logits, y, reduction=reduction) for logits, y in pieces(model(batch["x"]), batch["y"])]
        return sum(parts) / ((batch["y"] != -100).sum() if reduction == "sum" else len(parts))

    return step


CHUNKS = {
    "flat": in_chunks(lambda z, y: zip(z.view(-1, C).split(10), y.view(-1).split(10), strict=True)),
    "flat, mean of means": in_chunks(
        lambda z, y: zip(z.view(-1, C).split(12), y.view(-1).split(12), strict=True), "mean"
    ),
    "by time": in_chunks(
        lambda z, y: ((a.reshape(-1, C), b.reshape(-1)) for a, b in zip(z.split(2, 1), y.split(2, 1), strict=True))
    ),
}


def ignored_sum(model, batch):
    losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"], reduction="none", ignore_index=-100)
    return losses.sum() / (batch["y"] != -100).sum()


def weighted_sum(model, batch):
    return 0.5 * against(F.mse_loss)(model, batch) + 2.0 * F.cross_entropy(*flat(model, batch))


class TimeMajor(Model):
    def forward(self, x):
        return super().forward(x).transpose(0, 1).contiguous()


TIME_MAJOR = {
    "cross_entropy": lambda m, b: F.cross_entropy(m(b["x"]).view(-1, C), b["y"].t().reshape(-1)),
    "mse": lambda m, b: F.mse_loss(m(b["x"]), targets(b).transpose(0, 1)),
}
